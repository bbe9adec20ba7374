/* AVX2. maddubs multiplies unsigned by signed bytes and adds pairs in 16 bits. One side has 4 bits, so that STEPS such
 * sums fit (STEPS · 2 · 15 · 128 < 2^15) before they are widened to 32 bits.
 *
 * int4: the codes are unsigned, the activations signed, and the zero point is subtracted through the sums of the
 * activations. Look-up: weights are signed bytes, so a + 128 is cut into two unsigned nibbles, which take the rows of a
 * tile in two; what the 128 adds is a constant of each block and column. */
#include "modelgrove.h"

#include <immintrin.h>
#include <string.h>

#define TARGET MG_TARGET_AVX2
#define TILE 6
#define STEPS 8
#define WIDEST 256

TARGET MG_INLINE __m256i load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
TARGET MG_INLINE void store(void *to, __m256i value) { _mm256_storeu_si256((__m256i *)to, value); }

TARGET MG_INLINE int32_t total32(__m256i v) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

TARGET static void encode_int4(const int8_t *codes, size_t count, size_t width, uint8_t *out, float *sums) {
    memcpy(out, codes, count);
    for (size_t block = 0; block < count / width; block++) {
        __m256i total = _mm256_setzero_si256();
        for (size_t k = 0; k < width; k += UNIT) {
            __m128i some = _mm_loadu_si128((const __m128i *)(codes + block * width + k));
            total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_cvtepi8_epi16(some), _mm256_set1_epi16(1)));
        }
        sums[block] = (float)total32(total);
    }
}

TARGET static void encode_lut(const int8_t *codes, size_t count, size_t width, uint8_t *out, float *sums) {
    (void)width, (void)sums;
    for (size_t k = 0; k < count; k++) {
        uint8_t shifted = (uint8_t)codes[k] ^ 0x80;
        out[k] = shifted & 15;
        out[count + k] = shifted >> 4;
    }
}

/* Lanes 2 · side and 2 · side + 1 of the four quarters of a unit, one code a byte: eight columns. */
TARGET MG_INLINE void quarters(const uint8_t *unit, size_t side, __m256i codes[4]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int pair = 0; pair < 2; pair++) {
        __m256i both = load(unit + 64 * pair + 32 * side);
        codes[2 * pair] = _mm256_and_si256(both, nibble);
        codes[2 * pair + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
    }
}

/* Quarters, one column a lane → four vectors of the eight columns in order, 32 bits of each. Its own inverse. */
TARGET MG_INLINE void transpose(__m256i v[4]) {
    __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm256_unpacklo_epi64(a, c), v[1] = _mm256_unpackhi_epi64(a, c);
    v[2] = _mm256_unpacklo_epi64(b, d), v[3] = _mm256_unpackhi_epi64(b, d);
}

/* Eight columns of a block; -128 times the sum of their weights. */
TARGET MG_INLINE __m256i unpack_side(const uint8_t *codes, size_t units, size_t side, const int8_t *tables,
                                     uint8_t *out) {
    __m256i total = _mm256_setzero_si256();
    for (size_t unit = 0; unit < units; unit++) {
        __m256i v[4];
        quarters(codes + 128 * unit, side, v);
        if (tables)
            for (int i = 0; i < 4; i++)
                v[i] = _mm256_shuffle_epi8(load(tables + 64 * i + 32 * side), v[i]);
        transpose(v);
        for (int i = 0; i < 4; i++) {
            store(out + 256 * unit + 64 * i + 32 * side, v[i]);
            if (tables) {
                __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), v[i]);
                total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(-128)));
            }
        }
    }
    return total;
}

TARGET static void unpack(const mg_weight *weight, size_t panel, mg_panel *out) {
    size_t units = weight->width / UNIT;
    for (size_t block = 0; block < weight->blocks; block++) {
        const uint8_t *record = mg_block(weight, panel, block), *scales = record + PANEL * weight->width / 2;
        memcpy(out->scales + block * PANEL, scales, PANEL * sizeof(float));
        for (size_t eight = 0; eight < 4; eight++) {
            size_t half = eight / 2, at = block * PANEL + 8 * eight;
            const int8_t *tables = weight->tables ? mg_tables(weight, panel) + half * TABLES / 2 : NULL;
            __m256i term = unpack_side(record + half * units * 128, units, eight % 2, tables,
                                       out->values + (2 * block + half) * units * 256);
            if (tables) {
                store((int32_t *)out->terms + at, term);
            } else {
                const uint8_t *zeros = scales + PANEL * sizeof(float) + 8 * eight;
                __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)zeros));
                _mm256_storeu_ps((float *)out->terms + at, _mm256_cvtepi32_ps(wide));
            }
        }
    }
}

/* Sums in 16 bits over 4 · steps inputs, six rows by 16 columns: twelve sums, two weights, an activation and a product
 * take all 16 registers, which compilers spill. Rows 0 to 2 are at near + row · stride, 3 to 5 at far. Steps come in
 * fours; the first product of each sum is written, the others are added. */
#define WRITE(PRODUCT, left, right) PRODUCT("%%ymm12", "%[" left "]") PRODUCT("%%ymm13", "%[" right "]")
#define ADD(PRODUCT, left, right)                                                                                      \
    PRODUCT("%%ymm12", "%%ymm15") "vpaddw %%ymm15, %[" left "], %[" left "]\n\t"                                       \
    PRODUCT("%%ymm13", "%%ymm14") "vpaddw %%ymm14, %[" right "], %[" right "]\n\t"
#define ROW(PUT, PRODUCT, at, left, right) "vpbroadcastd " at ", %%ymm14\n\t" PUT(PRODUCT, left, right)
#define STEP(PUT, PRODUCT, weight, input)                                                                              \
    "vmovdqu " weight "(%[weights]), %%ymm12\n\t"                                                                      \
    "vmovdqu 32+" weight "(%[weights]), %%ymm13\n\t"                                                                   \
    ROW(PUT, PRODUCT, input "(%[near])", "s0", "s1")                                                                   \
    ROW(PUT, PRODUCT, input "(%[near],%[stride])", "s2", "s3")                                                         \
    ROW(PUT, PRODUCT, input "(%[near],%[stride],2)", "s4", "s5")                                                       \
    ROW(PUT, PRODUCT, input "(%[far])", "s6", "s7")                                                                    \
    ROW(PUT, PRODUCT, input "(%[far],%[stride])", "s8", "s9")                                                          \
    ROW(PUT, PRODUCT, input "(%[far],%[stride],2)", "s10", "s11")
#define FOUR_STEPS(PUT, PRODUCT)                                                                                       \
    STEP(PUT, PRODUCT, "0", "0") STEP(ADD, PRODUCT, "64", "4")                                                         \
    STEP(ADD, PRODUCT, "128", "8") STEP(ADD, PRODUCT, "192", "12")
#define SUM(i) [s##i] "=&x"(s[i])

#define NARROW(name, PRODUCT)                                                                                          \
    TARGET MG_INLINE void name(const uint8_t *weights, const uint8_t *near, const uint8_t *far, size_t stride,         \
                               size_t steps, __m256i s[12]) {                                                          \
        __asm__ volatile(FOUR_STEPS(WRITE, PRODUCT) "sub $4, %[steps]\n\tjz 2f\n1:\n\t"                                \
                         "add $256, %[weights]\n\tadd $16, %[near]\n\tadd $16, %[far]\n\t"                             \
                         FOUR_STEPS(ADD, PRODUCT) "sub $4, %[steps]\n\tjnz 1b\n2:"                                     \
                         : SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7), SUM(8), SUM(9), SUM(10),    \
                           SUM(11), [weights] "+r"(weights), [near] "+r"(near), [far] "+r"(far), [steps] "+r"(steps)   \
                         : [stride] "r"(stride)                                                                        \
                         : "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory");                                        \
    }
#define CODES_UNSIGNED(weight, to) "vpmaddubsw %%ymm14, " weight ", " to "\n\t"
#define INPUTS_UNSIGNED(weight, to) "vpmaddubsw " weight ", %%ymm14, " to "\n\t"
NARROW(narrow_int4, CODES_UNSIGNED)
NARROW(narrow_lut, INPUTS_UNSIGNED)

/* Inputs in the next run of at most STEPS steps. */
MG_INLINE size_t run(size_t left) { return left < 4 * STEPS ? left : 4 * STEPS; }

/* sum += scale · total, for numbers below 2^24. */
TARGET MG_INLINE void add_scaled(__m256 total, __m256 scale, int first, float *sum) {
    __m256 before = first ? _mm256_setzero_ps() : _mm256_loadu_ps(sum);
    _mm256_storeu_ps(sum, _mm256_fmadd_ps(total, scale, before));
}

/* Totals of a half of a block for `count` rows: runs widened, scaled and added to the sums. */
TARGET MG_INLINE void widen(__m256i narrow[][12], size_t runs, const int count, const float *inputs, size_t stride,
                            const float *scales, const float *zeros, int first, float *sums) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 2
    for (int side = 0; side < 2; side++) {
        __m256 scale = _mm256_loadu_ps(scales + 8 * side), zero = _mm256_loadu_ps(zeros + 8 * side);
#pragma GCC unroll 6
        for (int r = 0; r < count; r++) {
            __m256i total = _mm256_madd_epi16(narrow[0][2 * r + side], ones);
            for (size_t i = 1; i < runs; i++)
                total = _mm256_add_epi32(total, _mm256_madd_epi16(narrow[i][2 * r + side], ones));
            __m256 sum = _mm256_broadcast_ss(inputs + r * stride);
            __m256 exact = _mm256_fnmadd_ps(sum, zero, _mm256_cvtepi32_ps(total));
            add_scaled(exact, scale, first, sums + r * PANEL + 8 * side);
        }
    }
}

/* Both halves are multiplied before either is widened, so that no widening waits for its last product. Rows that the
 * tile lacks are multiplied too, from whatever is there, and not used. */
TARGET static void multiply_int4(const mg_weight *weight, const mg_panel *panel, mg_rows rows, size_t count,
                                 float *sums) {
    size_t width = weight->width, blocks = weight->blocks, runs = (width + 4 * STEPS - 1) / (4 * STEPS);
    for (size_t block = 0; block < blocks; block++, rows.codes += width, rows.sums++) {
        __m256i narrow[2][WIDEST / (4 * STEPS)][12];
        for (size_t half = 0; half < 2; half++)
            for (size_t i = 0; i < runs; i++) {
                size_t k = i * 4 * STEPS;
                const uint8_t *near = rows.codes + k, *far = near + 3 * rows.stride;
                narrow_int4(panel->values + (2 * block + half) * 16 * width + 16 * k, near, far, rows.stride,
                            run(width - k) / 4, narrow[half][i]);
            }
        for (size_t half = 0; half < 2; half++) {
            const float *scales = panel->scales + block * PANEL + 16 * half;
            const float *zeros = (const float *)panel->terms + block * PANEL + 16 * half;
            float *out = sums + 16 * half;
            if (count == TILE && runs == 2)
                widen(narrow[half], 2, TILE, rows.sums, blocks, scales, zeros, block == 0, out);
            else
                for (size_t r = 0; r < count; r++)
                    widen((void *)&narrow[half][0][2 * r], runs, 1, rows.sums + r * blocks, blocks, scales, zeros,
                          block == 0, out + r * PANEL);
        }
    }
}

TARGET static void multiply_lut(const mg_weight *weight, const mg_panel *panel, mg_rows rows, size_t count,
                                float *sums) {
    size_t width = weight->width, high = weight->blocks * width;
    for (size_t block = 0; block < weight->blocks; block++)
        for (size_t half = 0; half < 2; half++) {
            const uint8_t *values = panel->values + (2 * block + half) * 16 * width;
            const int32_t *terms = (const int32_t *)panel->terms + block * PANEL + 16 * half;
            __m256i totals[6], narrow[12];
#pragma GCC unroll 6
            for (int i = 0; i < 6; i++)
                totals[i] = load(terms + 8 * (i % 2));
            for (size_t k = 0; k < width; k += 4 * STEPS) {
                const uint8_t *near = rows.codes + block * width + k;
                narrow_lut(values + 16 * k, near, near + high, rows.stride, run(width - k) / 4, narrow);
#pragma GCC unroll 6
                for (int i = 0; i < 6; i++) {
                    __m256i low = _mm256_madd_epi16(narrow[i], _mm256_set1_epi16(1));
                    __m256i upper = _mm256_madd_epi16(narrow[i + 6], _mm256_set1_epi16(16));
                    totals[i] = _mm256_add_epi32(totals[i], _mm256_add_epi32(low, upper));
                }
            }
            const float *scales = panel->scales + block * PANEL + 16 * half;
            for (size_t r = 0; r < count; r++)
                for (int side = 0; side < 2; side++)
                    add_scaled(_mm256_cvtepi32_ps(totals[2 * r + side]), _mm256_loadu_ps(scales + 8 * side), block == 0,
                               sums + r * PANEL + 16 * half + 8 * side);
        }
}

TARGET MG_INLINE __m256 spread(__m256 columns, const int quarter) {
    switch (quarter) {
    case 0: return _mm256_permute_ps(columns, 0x00);
    case 1: return _mm256_permute_ps(columns, 0x55);
    case 2: return _mm256_permute_ps(columns, 0xAA);
    default: return _mm256_permute_ps(columns, 0xFF);
    }
}

/* Eight columns of a block times one row, four partial sums a column; `inputs` receives those of the activations. */
TARGET MG_INLINE void dot_int4(const uint8_t *units, size_t width, size_t side, const int8_t *codes,
                               __m256i totals[4], __m256i *inputs) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (size_t k = 0; k < width; k += 8 * UNIT) {
        __m256i narrow[4], sum = _mm256_setzero_si256();
        for (int i = 0; i < 4; i++)
            narrow[i] = _mm256_setzero_si256();
        for (size_t at = k; at < k + 8 * UNIT && at < width; at += UNIT) {
            __m256i v[4], a = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(codes + at)));
            quarters(units + 8 * at, side, v);
            for (int i = 0; i < 4; i++)
                narrow[i] = _mm256_add_epi16(narrow[i], _mm256_maddubs_epi16(v[i], a));
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_set1_epi8(1), a));
        }
        for (int i = 0; i < 4; i++)
            totals[i] = _mm256_add_epi32(totals[i], _mm256_madd_epi16(narrow[i], ones));
        *inputs = _mm256_add_epi32(*inputs, _mm256_madd_epi16(sum, ones));
    }
}

TARGET MG_INLINE void dot_lut(const uint8_t *units, size_t width, size_t side, const int8_t *codes,
                              const int8_t *tables, __m256i totals[4]) {
    for (size_t k = 0; k < width; k += UNIT) {
        __m256i v[4], a = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(codes + k)));
        quarters(units + 8 * k, side, v);
        for (int i = 0; i < 4; i++) {
            __m256i weights = _mm256_shuffle_epi8(load(tables + 64 * i + 32 * side), v[i]);
            __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(a, weights));
            totals[i] = _mm256_add_epi32(totals[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
    }
}

/* Eight columns times one row; `tables` of their half of the panel, or NULL. */
TARGET MG_INLINE void vector_eight(const mg_weight *weight, size_t panel, size_t eight, const int8_t *codes,
                                   const int8_t *tables, float *sums) {
    size_t width = weight->width, half = eight / 2, side = eight % 2;
    __m256 results[4];
    for (int i = 0; i < 4; i++)
        results[i] = _mm256_setzero_ps();
    for (size_t block = 0; block < weight->blocks; block++) {
        const uint8_t *record = mg_block(weight, panel, block), *scales = record + PANEL * width / 2;
        __m256i totals[4], inputs = _mm256_setzero_si256();
        for (int i = 0; i < 4; i++)
            totals[i] = _mm256_setzero_si256();
        __m256 zero = _mm256_setzero_ps(), scale = _mm256_loadu_ps((const float *)scales + 8 * eight);
        if (tables) {
            dot_lut(record + half * 8 * width, width, side, codes + block * width, tables, totals);
        } else {
            const uint8_t *zeros = scales + PANEL * sizeof(float) + 8 * eight;
            zero = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)zeros)));
            dot_int4(record + half * 8 * width, width, side, codes + block * width, totals, &inputs);
        }
        for (int i = 0; i < 4; i++) {
            __m256 sum = _mm256_cvtepi32_ps(inputs);
            __m256 exact = _mm256_fnmadd_ps(spread(zero, i), sum, _mm256_cvtepi32_ps(totals[i]));
            results[i] = _mm256_fmadd_ps(spread(scale, i), exact, results[i]);
        }
    }
    __m256i parts[4];
    for (int i = 0; i < 4; i++)
        parts[i] = _mm256_castps_si256(results[i]);
    transpose(parts);
    __m256 low = _mm256_add_ps(_mm256_castsi256_ps(parts[0]), _mm256_castsi256_ps(parts[1]));
    __m256 high = _mm256_add_ps(_mm256_castsi256_ps(parts[2]), _mm256_castsi256_ps(parts[3]));
    _mm256_storeu_ps(sums + 8 * eight, _mm256_add_ps(low, high));
}

TARGET static void vector_int4(const mg_weight *weight, size_t panel, const int8_t *codes, float *sums) {
    for (size_t eight = 0; eight < 4; eight++)
        vector_eight(weight, panel, eight, codes, NULL, sums);
}

TARGET static void vector_lut(const mg_weight *weight, size_t panel, const int8_t *codes, float *sums) {
    for (size_t eight = 0; eight < 4; eight++)
        vector_eight(weight, panel, eight, codes, mg_tables(weight, panel) + eight / 2 * TABLES / 2, sums);
}

/* a / b, correctly rounded for values of moderate size, from the rounded 1 / b: two corrections by the exact
 * remainder (Markstein, "Computation of elementary functions on the IBM RISC System/6000", 1990, theorem 2). */
TARGET MG_INLINE __m256 divide(__m256 a, __m256 b, __m256 inverse) {
    __m256 quotient = _mm256_mul_ps(a, inverse);
    quotient = _mm256_fmadd_ps(_mm256_fnmadd_ps(quotient, b, a), inverse, quotient);
    return _mm256_fmadd_ps(_mm256_fnmadd_ps(quotient, b, a), inverse, quotient);
}

TARGET MG_INLINE __m256i rest(size_t left) {
    __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left < 8 ? (int)left : 8), places);
}

TARGET static uint32_t smooth_row(const float *x, const float *smooth, const float *inverse, size_t count, float *out) {
    __m256i largest = _mm256_setzero_si256();
    for (size_t k = 0; k < count; k += 8) {
        __m256i mask = rest(count - k);
        __m256 value = _mm256_maskload_ps(x + k, mask);
        if (smooth) {
            __m256 by = _mm256_maskload_ps(smooth + k, mask);
            value = inverse ? divide(value, by, _mm256_maskload_ps(inverse + k, mask)) : _mm256_div_ps(value, by);
            _mm256_maskstore_ps(out + k, mask, value);
        }
        __m256i bits = _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7FFFFFFF));
        largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, mask));
    }
    __m128i some = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    some = _mm_max_epu32(some, _mm_shuffle_epi32(some, 0x4E));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(some, _mm_shuffle_epi32(some, 0xB1)));
}

TARGET static void quantize(const float *x, float scale, size_t count, int8_t *codes) {
    __m256 by = _mm256_set1_ps(scale), inverse = _mm256_set1_ps(1.0f / scale);
    for (size_t k = 0; k < count; k += 8) {
        __m256 value = divide(_mm256_maskload_ps(x + k, rest(count - k)), by, inverse);
        __m256i whole = _mm256_cvtps_epi32(value);
        __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        __m128i bytes = _mm_packs_epi16(words, words);
        if (count - k >= 8) {
            _mm_storel_epi64((__m128i *)(codes + k), bytes);
        } else {
            int64_t last = _mm_cvtsi128_si64(bytes);
            memcpy(codes + k, &last, count - k);
        }
    }
}

TARGET MG_INLINE void combine_rows(const float *a, size_t stride, const float *b, size_t depth, size_t columns,
                                   const float *factor, const float *sums, const float *bias, const int count,
                                   float *out, size_t out_stride) {
    __m256 totals[TILE][2];
#pragma GCC unroll 6
    for (int r = 0; r < count; r++)
#pragma GCC unroll 2
        for (int side = 0; side < 2; side++) {
            totals[r][side] = bias ? _mm256_loadu_ps(bias + 8 * side) : _mm256_setzero_ps();
            if (factor)
                totals[r][side] = _mm256_fmadd_ps(_mm256_loadu_ps(sums + r * PANEL + 8 * side),
                                                  _mm256_set1_ps(factor[r]), totals[r][side]);
        }
    for (size_t k = 0; k < depth; k++)
#pragma GCC unroll 6
        for (int r = 0; r < count; r++)
#pragma GCC unroll 2
            for (int side = 0; side < 2; side++)
                totals[r][side] = _mm256_fmadd_ps(_mm256_set1_ps(a[r * stride + k]),
                                                  _mm256_loadu_ps(b + k * columns + 8 * side), totals[r][side]);
#pragma GCC unroll 6
    for (int r = 0; r < count; r++)
#pragma GCC unroll 2
        for (int side = 0; side < 2; side++)
            _mm256_storeu_ps(out + r * out_stride + 8 * side, totals[r][side]);
}

TARGET static void combine(const float *a, size_t stride, const float *b, size_t depth, size_t columns,
                           const float *factor, const float *sums, const float *bias, size_t count, float *out,
                           size_t out_stride) {
    for (size_t r = 0; r < count;) {
        size_t left = count - r, rows = left >= 6 ? 6 : left >= 2 ? 2 : 1;
        for (size_t column = 0; column < columns; column += 16) {
#define CALL(n)                                                                                                        \
    combine_rows(a + r * stride, stride, b + column, depth, columns, factor ? factor + r : NULL,                       \
                 factor ? sums + r * PANEL + column : NULL, bias ? bias + column : NULL, n,                            \
                 out + r * out_stride + column, out_stride)
            switch (rows) {
            case 6: CALL(6); break;
            case 2: CALL(2); break;
            default: CALL(1); break;
            }
#undef CALL
        }
        r += rows;
    }
}

const mg_isa mg_isa_avx2 = {
    .int4 = {TILE, 1, encode_int4, unpack, multiply_int4, vector_int4},
    .lut = {TILE / 2, 2, encode_lut, unpack, multiply_lut, vector_lut},
    .smooth = smooth_row,
    .quantize = quantize,
    .combine = combine,
};
