/* AVX2: vpmaddubsw multiplies unsigned codes by signed activations and adds pairs in 16 bits, which may saturate.
 *
 * Two things keep that exact at full speed, both decided from the activations as their patches are copied:
 * - 4 bits: 15 · Σ|a| of a 16-bit lane over a whole slice nearly always fits; the slices of tiles where it does not
 *   are widened every 32 columns (15 · 127 · 16 < 2^15).
 * - 8 bits: 255 · (|a0| + |a1|) fits if |a0| + |a1| <= 128. Groups of four columns where it does not are split,
 *   a = (a >> 1) + rest, and the rest is multiplied in a second, short loop.
 */
#include "conv2d.h"

#include <immintrin.h>
#include <string.h>

enum { ROWS = 4, LANE_4 = 32767 / 15, PAIR_8 = 32767 / 255, NARROW = 32 };

/* Σ a of a slice; Σ |a| over the columns that even and odd 16-bit lanes add up. */
MG_TARGET_AVX2 static int sum_row(const int8_t *a, int length, int *lane) {
    const __m128i ones = _mm_set1_epi8(1);
    __m128i sum = _mm_setzero_si128(), sizes = sum;
    for (int k = 0; k < length; k += 8) {
        __m128i part = _mm_loadl_epi64((const __m128i *)(a + k));
        sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_maddubs_epi16(ones, part), _mm_set1_epi16(1)));
        /* Two 16-bit halves in each 32 bits: their sums stay below 2^16. */
        sizes = _mm_add_epi32(sizes, _mm_maddubs_epi16(_mm_abs_epi8(part), ones));
    }
    uint32_t both = (uint32_t)(_mm_cvtsi128_si32(sizes) + _mm_extract_epi32(sizes, 1));
    *lane = (int)(both >> 16 > (both & 0xffff) ? both >> 16 : both & 0xffff);
    return _mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 1);
}

/* Halve the activations of groups of four columns whose products may saturate; returns how many rests there are now. */
MG_TARGET_AVX2 static int split_quads(mg_conv_task *task, int tile, int start, int length, int count) {
    int8_t *a = (int8_t *)task->a + tile * ROWS * MG_CONV_DEPTH;
    for (int k = start; k < start + length; k += 8) {
        __m128i most = _mm_setzero_si128();
        for (int r = 0; r < ROWS; r++) {
            __m128i part = _mm_loadl_epi64((const __m128i *)(a + r * MG_CONV_DEPTH + k));
            most = _mm_max_epi16(most, _mm_maddubs_epi16(_mm_abs_epi8(part), _mm_set1_epi8(1)));
        }
        int hot = _mm_movemask_epi8(_mm_cmpgt_epi16(most, _mm_set1_epi16(PAIR_8)));
        for (int quad = 0; hot && quad < 2; quad++) {
            if (!(hot >> quad * 4 & 15))
                continue;
            for (int r = 0; r < ROWS; r++)
                for (int i = 0; i < 4; i++) {
                    int8_t *at = a + r * MG_CONV_DEPTH + k + quad * 4 + i;
                    int8_t part = (int8_t)(*at >> 1);
                    task->rest[tile][count][r][i] = (int8_t)(*at - part);
                    *at = part;
                }
            task->rest_quads[tile][count++] = (uint8_t)(k / 4 + quad);
        }
    }
    return count;
}

MG_TARGET_AVX2 void mg_conv_rows_avx2(mg_conv_task *task, int bits) {
    int first = task->slices->start;
    for (int tile = 0; tile < task->rows / ROWS; tile++) {
        int rests = 0;
        for (int s = 0; s < task->slice_count; s++) {
            int start = task->slices[s].start - first, length = task->slices[s].length, fits = 1;
            for (int row = tile * ROWS; row < (tile + 1) * ROWS; row++) {
                int lane;
                task->row_sums[row][s] =
                    (float)sum_row((const int8_t *)task->a + row * MG_CONV_DEPTH + start, length, &lane);
                fits &= lane <= LANE_4;
            }
            task->narrow[tile][s] = (uint8_t)fits;
            if (bits == 8)
                rests = split_quads(task, tile, start, length, rests);
            task->rest_ends[tile][s] = (uint8_t)rests;
        }
    }
}

/* sums += (products - zero · Σ a) · scale; all that is subtracted is a whole number below 2^24. */
MG_TARGET_AVX2 static inline void add_slice(const mg_conv_task *task, __m256i products[ROWS][2], int tile, int s,
                                            int side, float *sums) {
    const float *scales = task->scales[s] + side;
    const int32_t *zeros = task->offsets[s] + side;
    for (int half = 0; half < 2; half++) {
        __m256 scale = _mm256_load_ps(scales + half * 8);
        __m256 zero = _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i *)(zeros + half * 8)));
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            float *at = sums + r * task->stride + half * 8;
            __m256 total = _mm256_broadcast_ss(&task->row_sums[tile * ROWS + r][s]);
            __m256 exact = _mm256_fnmadd_ps(zero, total, _mm256_cvtepi32_ps(products[r][half]));
            _mm256_storeu_ps(at, _mm256_fmadd_ps(exact, scale, _mm256_loadu_ps(at)));
        }
    }
}

/* In assembly, because compilers spill sums when they reorder the intrinsics: += products of 16-bit, 32-bit lanes. */
MG_TARGET_AVX2 static inline __m256i add_words(__m256i sum, __m256i codes, __m256i quad) {
    __m256i product;
    __asm__("vpmaddubsw %[quad], %[codes], %[product]\n\tvpaddw %[product], %[sum], %[sum]"
            : [sum] "+x"(sum), [product] "=&x"(product)
            : [codes] "x"(codes), [quad] "x"(quad));
    return sum;
}

MG_TARGET_AVX2 static inline __m256i add_products(__m256i sum, __m256i codes, __m256i quad, __m256i ones) {
    __m256i product;
    __asm__("vpmaddubsw %[quad], %[codes], %[product]\n\tvpmaddwd %[ones], %[product], %[product]\n\t"
            "vpaddd %[product], %[sum], %[sum]"
            : [sum] "+x"(sum), [product] "=&x"(product)
            : [codes] "x"(codes), [quad] "x"(quad), [ones] "x"(ones));
    return sum;
}

MG_TARGET_AVX2 static inline __m256i load(const uint8_t *from) {
    return _mm256_load_si256((const __m256i *)from);
}

MG_TARGET_AVX2 static inline __m256i repeat(const void *quad) {
    int32_t four;
    memcpy(&four, quad, sizeof four);
    return _mm256_set1_epi32(four);
}

/* Products of `length` columns, which fit into 16 bits, as 32-bit sums. */
MG_TARGET_AVX2 static inline void multiply_narrow(const uint8_t *a, const uint8_t *b, int length,
                                                  __m256i products[ROWS][2]) {
    __m256i lanes[ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
        lanes[r][0] = lanes[r][1] = _mm256_setzero_si256();
    for (const uint8_t *end = a + length; a < end; a += 8, b += 256)
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            __m256i b0 = load(b + k * 128), b1 = load(b + k * 128 + 32);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                __m256i quad = repeat(a + r * MG_CONV_DEPTH + k * 4);
                lanes[r][0] = add_words(lanes[r][0], b0, quad);
                lanes[r][1] = add_words(lanes[r][1], b1, quad);
            }
        }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
            products[r][half] = _mm256_madd_epi16(lanes[r][half], _mm256_set1_epi16(1));
}

/* The same where only products of NARROW columns fit. */
MG_TARGET_AVX2 static void multiply_wide(const uint8_t *a, const uint8_t *b, int length, __m256i products[ROWS][2]) {
    memset(products, 0, sizeof(__m256i[ROWS][2]));
    for (int k = 0; k < length; k += NARROW) {
        __m256i part[ROWS][2];
        multiply_narrow(a + k, b + k * 32, length - k < NARROW ? length - k : NARROW, part);
        for (int i = 0; i < ROWS * 2; i++)
            products[i / 2][i % 2] = _mm256_add_epi32(products[i / 2][i % 2], part[i / 2][i % 2]);
    }
}

/* 4 pixels × 16 output channels, 4-bit codes. */
MG_TARGET_AVX2 static void multiply_nibbles(const mg_conv_task *task, int tile, int side, float *sums) {
    const uint8_t *a = task->a + tile * ROWS * MG_CONV_DEPTH, *b = task->b + side * 4;
    for (int s = 0; s < task->slice_count; s++) {
        int length = task->slices[s].length;
        __m256i products[ROWS][2];
        if (task->narrow[tile][s])
            multiply_narrow(a, b, length, products);
        else
            multiply_wide(a, b, length, products);
        add_slice(task, products, tile, s, side, sums);
        a += length;
        b += length * MG_CONV_PANEL;
    }
}

/* One group of four columns; the rows of `a` are `pitch` apart. */
MG_TARGET_AVX2 static inline void multiply_quad(const void *a, int pitch, const uint8_t *b, __m256i products[ROWS][2]) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i b0 = load(b), b1 = load(b + 32);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
        __m256i quad = repeat((const uint8_t *)a + r * pitch);
        products[r][0] = add_products(products[r][0], b0, quad, ones);
        products[r][1] = add_products(products[r][1], b1, quad, ones);
    }
}

/* The same with 8-bit codes. */
MG_TARGET_AVX2 static void multiply_bytes(const mg_conv_task *task, int tile, int side, float *sums) {
    const uint8_t *a = task->a + tile * ROWS * MG_CONV_DEPTH, *b = task->b + side * 4;
    for (int s = 0, rest = 0; s < task->slice_count; s++) {
        __m256i products[ROWS][2];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
            products[r][0] = products[r][1] = _mm256_setzero_si256();
        for (const uint8_t *end = a + task->slices[s].length; a < end; a += 8, b += 256) {
            multiply_quad(a, MG_CONV_DEPTH, b, products);
            multiply_quad(a + 4, MG_CONV_DEPTH, b + 128, products);
        }
        for (; rest < task->rest_ends[tile][s]; rest++)
            multiply_quad(task->rest[tile][rest], 4, task->b + task->rest_quads[tile][rest] * 128 + side * 4, products);
        add_slice(task, products, tile, s, side, sums);
    }
}

/* Codes of a slice, a byte each, to `b`. */
MG_TARGET_AVX2 static void unpack_nibbles(const uint8_t *codes, int length, uint8_t *b) {
    const __m256i low = _mm256_set1_epi8(15);
    for (int k = 0; k < length; k += 8)
        for (int i = 0; i < 128; i += 32) {
            __m256i both = _mm256_loadu_si256((const __m256i *)(codes + k * 16 + i));
            _mm256_store_si256((__m256i *)(b + k * 32 + i), _mm256_and_si256(both, low));
            _mm256_store_si256((__m256i *)(b + k * 32 + 128 + i), _mm256_and_si256(_mm256_srli_epi16(both, 4), low));
        }
}

MG_TARGET_AVX2 void mg_conv_panel_avx2(mg_conv_task *task, const mg_conv *conv, int64_t panel, int64_t column) {
    const uint8_t *codes = conv->codes + panel * conv->depth * MG_CONV_PANEL * conv->bits / 8;
    int start = task->slices->start;
    for (int s = 0; s < task->slice_count; s++) {
        const mg_slice *slice = task->slices + s;
        int64_t place = (panel * conv->groups + slice->group) * MG_CONV_PANEL;
        uint8_t *b = task->b + (slice->start - start) * MG_CONV_PANEL;
        const uint8_t *from = codes + (int64_t)slice->start * MG_CONV_PANEL * conv->bits / 8;
        if (conv->bits == 4)
            unpack_nibbles(from, slice->length, b);
        else
            memcpy(b, from, (size_t)slice->length * MG_CONV_PANEL);
        memcpy(task->scales[s], conv->scales + place, sizeof task->scales[s]);
        for (int i = 0; i < MG_CONV_PANEL; i++)
            task->offsets[s][i] = conv->bits == 4 ? conv->zeros[place + i] : 128;
    }
    for (int tile = 0; tile < task->rows / ROWS; tile++)
        for (int side = 0; side < MG_CONV_PANEL; side += 16) {
            float *sums = task->sums + tile * ROWS * task->stride + column + side;
            (conv->bits == 4 ? multiply_nibbles : multiply_bytes)(task, tile, side, sums);
        }
}
