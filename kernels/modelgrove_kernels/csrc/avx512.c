/* AVX-512 VNNI. Tiles take a + 128 as the unsigned and the weight as the signed byte of vpdpbusd; what the 128 adds is
 * a constant of each block and column. A single row takes codes as the unsigned and a as the signed byte. */
#include "modelgrove.h"

#include <immintrin.h>
#include <string.h>

#define TARGET MG_TARGET_AVX512
#define TILE 12

TARGET static void encode(const int8_t *codes, size_t count, size_t width, uint8_t *out, float *sums) {
    (void)width, (void)sums;
    for (size_t k = 0; k < count; k++)
        out[k] = (uint8_t)codes[k] ^ 0x80;
}

/* The four quarters of a unit, one code a byte. */
TARGET MG_INLINE void quarters(const uint8_t *unit, __m512i codes[4]) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int pair = 0; pair < 2; pair++) {
        __m512i both = _mm512_loadu_si512(unit + 64 * pair);
        codes[2 * pair] = _mm512_and_si512(both, nibble);
        codes[2 * pair + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    }
}

/* Quarters, one column a lane → four vectors of all 16 columns in order, 32 bits of each. Its own inverse. */
TARGET MG_INLINE void transpose(__m512i v[4]) {
    __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(a, c), v[1] = _mm512_unpackhi_epi64(a, c);
    v[2] = _mm512_unpacklo_epi64(b, d), v[3] = _mm512_unpackhi_epi64(b, d);
}

/* One half of a block; `zeros` has the zero point in each byte of a column, `tables` those of the four quarters. */
TARGET MG_INLINE __m512i unpack_half(const uint8_t *codes, size_t units, __m512i zeros, const int8_t *tables,
                                     uint8_t *out) {
    const __m512i shift = _mm512_set1_epi8((char)0x80);
    __m512i total = _mm512_setzero_si512();
    for (size_t unit = 0; unit < units; unit++) {
        __m512i v[4];
        quarters(codes + 128 * unit, v);
        if (tables)
            for (int i = 0; i < 4; i++)
                v[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(tables + 64 * i), v[i]);
        transpose(v);
        for (int i = 0; i < 4; i++) {
            __m512i weights = tables ? v[i] : _mm512_sub_epi8(v[i], zeros);
            total = _mm512_dpbusd_epi32(total, shift, weights);
            _mm512_storeu_si512(out + 256 * unit + 64 * i, weights);
        }
    }
    return _mm512_sub_epi32(_mm512_setzero_si512(), total);
}

TARGET static void unpack(const mg_weight *weight, size_t panel, mg_panel *out) {
    size_t units = weight->width / UNIT;
    for (size_t block = 0; block < weight->blocks; block++) {
        const uint8_t *record = mg_block(weight, panel, block), *scales = record + PANEL * weight->width / 2;
        memcpy(out->scales + block * PANEL, scales, PANEL * sizeof(float));
        for (size_t half = 0; half < 2; half++) {
            __m512i zeros = _mm512_setzero_si512();
            const int8_t *tables = weight->tables ? mg_tables(weight, panel) + half * TABLES / 2 : NULL;
            if (!tables) {
                __m128i bytes = _mm_loadu_si128((const __m128i *)(scales + PANEL * sizeof(float) + 16 * half));
                zeros = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(0x01010101));
            }
            __m512i term = unpack_half(record + half * units * 128, units, zeros, tables,
                                       out->values + (2 * block + half) * units * 256);
            _mm512_storeu_si512((int32_t *)out->terms + block * PANEL + 16 * half, term);
        }
    }
}

TARGET MG_INLINE __m512i four_inputs(const uint8_t *codes) {
    int32_t value;
    memcpy(&value, codes, 4);
    return _mm512_set1_epi32(value);
}

TARGET MG_INLINE void add_scaled(__m512i total, __m512 scales, int first, float *sum) {
    __m512 before = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sum);
    _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scales, before));
}

TARGET MG_INLINE void multiply_rows(const mg_weight *weight, const mg_panel *panel, mg_rows rows, const int count,
                                    float *sums) {
    size_t width = weight->width, stride = rows.stride;
    const uint8_t *values = panel->values;
    for (size_t block = 0; block < weight->blocks; block++, values += PANEL * width) {
        const int32_t *terms = (const int32_t *)panel->terms + block * PANEL;
        const uint8_t *thirds[4];
        __m512i totals[TILE][2];
#pragma GCC unroll 12
        for (int r = 0; r < count; r++) {
            totals[r][0] = _mm512_loadu_si512(terms);
            totals[r][1] = _mm512_loadu_si512(terms + 16);
        }
#pragma GCC unroll 4
        for (int third = 0; third < 4; third++)
            thirds[third] = rows.codes + block * width + 3 * third * stride;
        for (size_t k = 0; k < width; k += UNIT) {
#pragma GCC unroll 4
            for (int step = 0; step < 4; step++) {
                __m512i left = _mm512_loadu_si512(values + 16 * k + 64 * step);
                __m512i right = _mm512_loadu_si512(values + 16 * (width + k) + 64 * step);
#pragma GCC unroll 12
                for (int r = 0; r < count; r++) {
                    __m512i input = four_inputs(thirds[r / 3] + r % 3 * stride + 4 * step);
                    __asm__("vpdpbusd %1, %2, %0" : "+v"(totals[r][0]) : "v"(left), "v"(input));
                    __asm__("vpdpbusd %1, %2, %0" : "+v"(totals[r][1]) : "v"(right), "v"(input));
                }
            }
#pragma GCC unroll 4
            for (int third = 0; third < 4; third++)
                thirds[third] += UNIT;
        }
        const float *scales = panel->scales + block * PANEL;
        __m512 left = _mm512_loadu_ps(scales), right = _mm512_loadu_ps(scales + 16);
#pragma GCC unroll 12
        for (int r = 0; r < count; r++) {
            add_scaled(totals[r][0], left, block == 0, sums + r * PANEL);
            add_scaled(totals[r][1], right, block == 0, sums + r * PANEL + 16);
        }
    }
}

TARGET static void multiply(const mg_weight *weight, const mg_panel *panel, mg_rows rows, size_t count, float *sums) {
    switch (count) {
#define CASE(n) case n: multiply_rows(weight, panel, rows, n, sums); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

TARGET MG_INLINE __m512 spread(__m512 columns, const int quarter) {
    switch (quarter) {
    case 0: return _mm512_permute_ps(columns, 0x00);
    case 1: return _mm512_permute_ps(columns, 0x55);
    case 2: return _mm512_permute_ps(columns, 0xAA);
    default: return _mm512_permute_ps(columns, 0xFF);
    }
}

/* One half of a panel times one row. Codes, or table entries + 128, are taken as unsigned; the zero point is 128 then. */
TARGET MG_INLINE void vector_half(const mg_weight *weight, size_t panel, size_t half, const int8_t *codes,
                                  const int lut, float *sums) {
    const __m512i shift = _mm512_set1_epi8((char)0x80);
    size_t width = weight->width, units = width / UNIT;
    __m512i tables[4];
    __m512 results[4];
    for (int i = 0; i < 4; i++) {
        results[i] = _mm512_setzero_ps();
        if (lut)
            tables[i] = _mm512_xor_si512(shift, _mm512_loadu_si512(mg_tables(weight, panel) + half * TABLES / 2 + 64 * i));
    }
    for (size_t block = 0; block < weight->blocks; block++) {
        const uint8_t *record = mg_block(weight, panel, block), *scales = record + PANEL * width / 2 + 64 * half;
        __m512i totals[4], ones = _mm512_set1_epi8(1), inputs = _mm512_setzero_si512();
        for (int i = 0; i < 4; i++)
            totals[i] = _mm512_setzero_si512();
        for (size_t unit = 0; unit < units; unit++) {
            __m512i v[4], a = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(codes + block * width) + unit));
            quarters(record + half * units * 128 + 128 * unit, v);
            for (int i = 0; i < 4; i++)
                totals[i] = _mm512_dpbusd_epi32(totals[i], lut ? _mm512_shuffle_epi8(tables[i], v[i]) : v[i], a);
            inputs = _mm512_dpbusd_epi32(inputs, ones, a);
        }
        __m512 sum = _mm512_cvtepi32_ps(inputs), scale = _mm512_loadu_ps((const float *)scales), zero = _mm512_set1_ps(128);
        if (!lut) {
            const uint8_t *zeros = record + PANEL * width / 2 + PANEL * sizeof(float) + 16 * half;
            zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)zeros)));
        }
        for (int i = 0; i < 4; i++) {
            __m512 exact = _mm512_fnmadd_ps(spread(zero, i), sum, _mm512_cvtepi32_ps(totals[i]));
            results[i] = _mm512_fmadd_ps(spread(scale, i), exact, results[i]);
        }
    }
    __m512i parts[4];
    for (int i = 0; i < 4; i++)
        parts[i] = _mm512_castps_si512(results[i]);
    transpose(parts);
    __m512 low = _mm512_add_ps(_mm512_castsi512_ps(parts[0]), _mm512_castsi512_ps(parts[1]));
    __m512 high = _mm512_add_ps(_mm512_castsi512_ps(parts[2]), _mm512_castsi512_ps(parts[3]));
    _mm512_storeu_ps(sums + 16 * half, _mm512_add_ps(low, high));
}

TARGET static void vector_int4(const mg_weight *weight, size_t panel, const int8_t *codes, float *sums) {
    vector_half(weight, panel, 0, codes, 0, sums);
    vector_half(weight, panel, 1, codes, 0, sums);
}

TARGET static void vector_lut(const mg_weight *weight, size_t panel, const int8_t *codes, float *sums) {
    vector_half(weight, panel, 0, codes, 1, sums);
    vector_half(weight, panel, 1, codes, 1, sums);
}

/* a / b, correctly rounded for values of moderate size, from the rounded 1 / b: two corrections by the exact
 * remainder (Markstein, "Computation of elementary functions on the IBM RISC System/6000", 1990, theorem 2). */
TARGET MG_INLINE __m512 divide(__m512 a, __m512 b, __m512 inverse) {
    __m512 quotient = _mm512_mul_ps(a, inverse);
    quotient = _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, b, a), inverse, quotient);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, b, a), inverse, quotient);
}

TARGET MG_INLINE __mmask16 rest(size_t left) { return left >= 16 ? 0xFFFF : (__mmask16)((1u << left) - 1); }

TARGET static uint32_t smooth_row(const float *x, const float *smooth, const float *inverse, size_t count, float *out) {
    __m512i largest = _mm512_setzero_si512();
    for (size_t k = 0; k < count; k += 16) {
        __mmask16 mask = rest(count - k);
        __m512 value = _mm512_maskz_loadu_ps(mask, x + k);
        if (smooth) {
            __m512 by = _mm512_maskz_loadu_ps(mask, smooth + k);
            value = inverse ? divide(value, by, _mm512_maskz_loadu_ps(mask, inverse + k)) : _mm512_maskz_div_ps(mask, value, by);
            _mm512_mask_storeu_ps(out + k, mask, value);
        }
        __m512i bits = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7FFFFFFF));
        largest = _mm512_max_epu32(largest, bits);
    }
    return _mm512_reduce_max_epu32(largest);
}

TARGET static void quantize(const float *x, float scale, size_t count, int8_t *codes) {
    __m512 by = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(1.0f / scale);
    for (size_t k = 0; k < count; k += 16) {
        __mmask16 mask = rest(count - k);
        __m512 value = divide(_mm512_maskz_loadu_ps(mask, x + k), by, inverse);
        _mm_mask_storeu_epi8(codes + k, mask, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(value)));
    }
}

TARGET MG_INLINE void combine_rows(const float *a, size_t stride, const float *b, size_t depth, const int halves,
                                   const float *factor, const float *sums, const float *bias, const int count,
                                   float *out, size_t out_stride) {
    __m512 totals[TILE][2];
#pragma GCC unroll 12
    for (int r = 0; r < count; r++)
#pragma GCC unroll 2
        for (int half = 0; half < halves; half++) {
            totals[r][half] = bias ? _mm512_loadu_ps(bias + 16 * half) : _mm512_setzero_ps();
            if (factor)
                totals[r][half] = _mm512_fmadd_ps(_mm512_loadu_ps(sums + r * PANEL + 16 * half),
                                                  _mm512_set1_ps(factor[r]), totals[r][half]);
        }
    for (size_t k = 0; k < depth; k++)
#pragma GCC unroll 12
        for (int r = 0; r < count; r++)
#pragma GCC unroll 2
            for (int half = 0; half < halves; half++)
                totals[r][half] = _mm512_fmadd_ps(_mm512_set1_ps(a[r * stride + k]),
                                                  _mm512_loadu_ps(b + k * 16 * halves + 16 * half), totals[r][half]);
#pragma GCC unroll 12
    for (int r = 0; r < count; r++)
#pragma GCC unroll 2
        for (int half = 0; half < halves; half++)
            _mm512_storeu_ps(out + r * out_stride + 16 * half, totals[r][half]);
}

TARGET static void combine(const float *a, size_t stride, const float *b, size_t depth, size_t columns,
                           const float *factor, const float *sums, const float *bias, size_t count, float *out,
                           size_t out_stride) {
    for (size_t r = 0; r < count;) {
        size_t left = count - r, rows = left >= 12 ? 12 : left >= 4 ? 4 : 1;
        const float *some = factor ? factor + r : NULL, *some_sums = factor ? sums + r * PANEL : NULL;
#define CALL(n, h)                                                                                                     \
    combine_rows(a + r * stride, stride, b, depth, h, some, some_sums, bias, n, out + r * out_stride, out_stride)
        switch (rows * (columns / 16)) {
        case 24: CALL(12, 2); break;
        case 12: CALL(12, 1); break;
        case 8: CALL(4, 2); break;
        case 4: CALL(4, 1); break;
        case 2: CALL(1, 2); break;
        default: CALL(1, 1); break;
        }
#undef CALL
        r += rows;
    }
}

const mg_isa mg_isa_avx512vnni = {
    .int4 = {TILE, 1, encode, unpack, multiply, vector_int4},
    .lut = {TILE, 1, encode, unpack, multiply, vector_lut},
    .smooth = smooth_row,
    .quantize = quantize,
    .combine = combine,
};
