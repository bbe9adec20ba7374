/* AVX-512 VNNI: vpdpbusd multiplies unsigned activations, a + 128, by signed weights, code - zero; what the 128 adds
 * is known for each slice and taken off first. */
#include "conv2d.h"

#include <immintrin.h>

enum { ROWS = 8 };

MG_TARGET_AVX512 void mg_conv_rows_avx512(mg_conv_task *task) {
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    for (int row = 0; row < task->rows; row++)
        for (int k = 0; k < MG_CONV_DEPTH; k += 64) {
            __m512i *at = (__m512i *)(task->a + row * MG_CONV_DEPTH + k);
            _mm512_store_si512(at, _mm512_xor_si512(_mm512_load_si512(at), sign));
        }
}

/* Weights of a slice, code - zero, to `b`; -128 times their sums to `offsets`. */
MG_TARGET_AVX512 static void unpack_nibbles(const uint8_t *codes, const uint8_t *zeros, int length, uint8_t *b,
                                            int32_t *offsets) {
    const __m512i low = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1), copies = _mm512_set1_epi32(0x01010101);
    for (int half = 0; half < 2; half++) {
        __m512i zero = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)zeros + half)), copies);
        __m512i sum = _mm512_setzero_si512();
        for (int k = 0; k < length; k += 8) {
            __m512i both = _mm512_loadu_si512(codes + k * 16 + half * 64);
            __m512i even = _mm512_sub_epi8(_mm512_and_si512(both, low), zero);
            __m512i odd = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), zero);
            sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, ones, even), ones, odd);
            _mm512_store_si512(b + k * 32 + half * 64, even);
            _mm512_store_si512(b + k * 32 + 128 + half * 64, odd);
        }
        _mm512_store_si512(offsets + half * 16, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), 7));
    }
}

MG_TARGET_AVX512 static void unpack_bytes(const uint8_t *codes, int length, uint8_t *b, int32_t *offsets) {
    const __m512i sign = _mm512_set1_epi8((char)0x80), ones = _mm512_set1_epi8(1);
    for (int half = 0; half < 2; half++) {
        __m512i sum = _mm512_setzero_si512();
        for (int k = 0; k < length; k += 4) {
            __m512i weights = _mm512_xor_si512(_mm512_loadu_si512(codes + k * 32 + half * 64), sign);
            sum = _mm512_dpbusd_epi32(sum, ones, weights);
            _mm512_store_si512(b + k * 32 + half * 64, weights);
        }
        _mm512_store_si512(offsets + half * 16, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), 7));
    }
}

/* 8 pixels × 32 output channels over all slices of the block. */
MG_TARGET_AVX512 static void multiply(const mg_conv_task *task, const float (*scales)[MG_CONV_PANEL], const uint8_t *a,
                                      float *sums) {
    const uint8_t *b = task->b;
    for (int s = 0; s < task->slice_count; s++) {
        __m512i left[ROWS], right[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            left[r] = _mm512_load_si512(task->offsets[s]);
            right[r] = _mm512_load_si512(task->offsets[s] + 16);
        }
        for (const uint8_t *end = a + task->slices[s].length; a < end; a += 4, b += 128) {
            __m512i b0 = _mm512_load_si512(b), b1 = _mm512_load_si512(b + 64);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                __m512i quad = _mm512_set1_epi32(*(const int32_t *)(a + r * MG_CONV_DEPTH));
                left[r] = _mm512_dpbusd_epi32(left[r], quad, b0);
                right[r] = _mm512_dpbusd_epi32(right[r], quad, b1);
            }
        }
        __m512 s0 = _mm512_loadu_ps(scales[s]), s1 = _mm512_loadu_ps(scales[s] + 16);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            float *at = sums + r * task->stride;
            _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(left[r]), s0, _mm512_loadu_ps(at)));
            _mm512_storeu_ps(at + 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(right[r]), s1, _mm512_loadu_ps(at + 16)));
        }
    }
}

MG_TARGET_AVX512 void mg_conv_panel_avx512(mg_conv_task *task, const mg_conv *conv, int64_t panel, int64_t column) {
    const uint8_t *codes = conv->codes + panel * conv->depth * MG_CONV_PANEL * conv->bits / 8;
    int start = task->slices->start;
    for (int s = 0; s < task->slice_count; s++) {
        const mg_slice *slice = task->slices + s;
        int64_t place = (panel * conv->groups + slice->group) * MG_CONV_PANEL;
        uint8_t *b = task->b + (slice->start - start) * MG_CONV_PANEL;
        const uint8_t *from = codes + (int64_t)slice->start * MG_CONV_PANEL * conv->bits / 8;
        if (conv->bits == 4)
            unpack_nibbles(from, conv->zeros + place, slice->length, b, task->offsets[s]);
        else
            unpack_bytes(from, slice->length, b, task->offsets[s]);
        for (int half = 0; half < 2; half++)
            _mm512_store_ps(task->scales[s] + half * 16, _mm512_loadu_ps(conv->scales + place + half * 16));
    }
    for (int row = 0; row < task->rows; row += ROWS)
        multiply(task, (const float(*)[MG_CONV_PANEL])task->scales, task->a + row * MG_CONV_DEPTH,
                 task->sums + row * task->stride + column);
}
