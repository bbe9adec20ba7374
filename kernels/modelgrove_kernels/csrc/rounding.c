/* Rounding to nearest on the grids of layouts int8 and int4, bit for bit as `packing.quantize` does it in torch.
 *
 * A matrix of float32, float16 or bfloat16 is read row by row; a row is widened to float32 and padded with zeros to
 * whole groups. Division and rounding are IEEE's, so the codes do not depend on who computes them.
 */
#include "modelgrove.h"

#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { F32 = 0, F16 = 1, BF16 = 2 };
enum { NO_MEMORY = 1, NOT_FINITE = 2, NOT_HALF = 4 };
enum { LANES = 8 };

/* The normal range of float16. */
#define HALF_LEAST 6.103515625e-05f
#define HALF_MOST 65504.0f

typedef struct {
    const void *values;
    int dtype;
    size_t rows, columns, group, groups;
} mg_matrix;

#define MG_TARGET __attribute__((target("avx2,fma,f16c")))

/* Row `row` in float32; `out` has room for all groups, whose padding is zeroed once by the caller. */
MG_TARGET static void widen(const mg_matrix *m, size_t row, float *out) {
    size_t at = row * m->columns, i = 0;
    if (m->dtype == F32) {
        memcpy(out, (const float *)m->values + at, m->columns * sizeof(float));
        return;
    }
    const uint16_t *source = (const uint16_t *)m->values + at;
    for (; i + LANES <= m->columns; i += LANES) {
        __m128i half = _mm_loadu_si128((const __m128i *)(source + i));
        __m256 wide = m->dtype == F16 ? _mm256_cvtph_ps(half)
                                      : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
        _mm256_storeu_ps(out + i, wide);
    }
    for (; i < m->columns; i++) {
        uint32_t bits = (uint32_t)source[i] << 16;
        if (m->dtype == F16)
            out[i] = _cvtsh_ss(source[i]);
        else
            memcpy(out + i, &bits, sizeof bits);
    }
}

MG_INLINE MG_TARGET float lane_sum(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

/* Lowest and highest of `count` values; both NaN if one is not finite. */
MG_TARGET static void range_of(const float *x, size_t count, float *low, float *high) {
    __m256 least = _mm256_set1_ps(INFINITY), most = _mm256_set1_ps(-INFINITY), zero = _mm256_setzero_ps(), odd = zero;
    size_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        __m256 v = _mm256_loadu_ps(x + i);
        least = _mm256_min_ps(least, v);
        most = _mm256_max_ps(most, v);
        odd = _mm256_or_ps(odd, _mm256_cmp_ps(_mm256_sub_ps(v, v), zero, _CMP_NEQ_UQ)); /* inf - inf and NaN - NaN */
    }
    float lows[LANES], highs[LANES];
    _mm256_storeu_ps(lows, least);
    _mm256_storeu_ps(highs, most);
    int finite = _mm256_testz_ps(odd, odd);
    float lowest = INFINITY, highest = -INFINITY;
    for (size_t lane = 0; lane < LANES; lane++) {
        lowest = lows[lane] < lowest ? lows[lane] : lowest;
        highest = highs[lane] > highest ? highs[lane] : highest;
    }
    for (; i < count; i++) {
        finite &= x[i] - x[i] == 0;
        lowest = x[i] < lowest ? x[i] : lowest;
        highest = x[i] > highest ? x[i] : highest;
    }
    *low = finite ? lowest : NAN;
    *high = finite ? highest : NAN;
}

/* Steps of one value from zero, within [low, high]; what is lost is added to *noise. */
MG_INLINE MG_TARGET __m256 steps_of(__m256 x, __m256 scale, __m256 low, __m256 high, __m256 *noise) {
    __m256 steps = _mm256_round_ps(_mm256_div_ps(x, scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    steps = _mm256_min_ps(_mm256_max_ps(steps, low), high);
    __m256 lost = _mm256_sub_ps(_mm256_mul_ps(steps, scale), x);
    *noise = _mm256_add_ps(*noise, _mm256_mul_ps(lost, lost));
    return steps;
}

/* Sixteen whole numbers in [-128, 127] or [0, 255] as bytes, in order. */
MG_INLINE MG_TARGET __m128i bytes_of(__m256 first, __m256 second) {
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(first), _mm256_cvtps_epi32(second));
    words = _mm256_permute4x64_epi64(words, 0xD8);
    __m256i bytes = _mm256_packs_epi16(words, words);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(bytes, 0x08));
}

typedef struct {
    double signal, noise;
} mg_energy;

/* Codes of one group, a byte each, and what they lose; `zero` is the zero point, -1 for layout int8. */
MG_TARGET static mg_energy round_group(const float *x, size_t count, float scale, int zero, uint8_t *codes) {
    float bottom = zero < 0 ? -127.0f : -(float)zero, top = zero < 0 ? 127.0f : 15.0f - (float)zero;
    float offset = zero < 0 ? 0.0f : (float)zero;
    __m256 divisor = _mm256_set1_ps(scale), low = _mm256_set1_ps(bottom), high = _mm256_set1_ps(top);
    __m256 shift = _mm256_set1_ps(offset), signal = _mm256_setzero_ps(), noise = signal;
    size_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        __m256 first = _mm256_loadu_ps(x + i), second = _mm256_loadu_ps(x + i + LANES);
        signal = _mm256_add_ps(signal, _mm256_add_ps(_mm256_mul_ps(first, first), _mm256_mul_ps(second, second)));
        first = _mm256_add_ps(steps_of(first, divisor, low, high, &noise), shift);
        second = _mm256_add_ps(steps_of(second, divisor, low, high, &noise), shift);
        _mm_storeu_si128((__m128i *)(codes + i), bytes_of(first, second));
    }
    mg_energy energy = {lane_sum(signal), lane_sum(noise)};
    for (; i < count; i++) {
        float steps = rintf(x[i] / scale);
        steps = steps < bottom ? bottom : steps > top ? top : steps;
        double lost = (double)(steps * scale - x[i]);
        energy.signal += (double)x[i] * x[i];
        energy.noise += lost * lost;
        codes[i] = (uint8_t)(int8_t)(steps + offset);
    }
    return energy;
}

/* Pairs of codes below 16 → a byte; the even one is the low nibble. `count` is even. */
MG_TARGET static void pack_nibbles(const uint8_t *codes, size_t count, uint8_t *out) {
    size_t i = 0;
    __m256i weights = _mm256_set1_epi16(0x1001);
    for (; i + 32 <= count; i += 32) {
        __m256i pairs = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i *)(codes + i)), weights);
        __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
        _mm_storeu_si128((__m128i *)(out + i / 2), _mm256_castsi256_si128(bytes));
    }
    for (; i < count; i += 2)
        out[i / 2] = (uint8_t)(codes[i] | codes[i + 1] << 4);
}

/* The grid of a group: its scale, rounded to float16, and zero point (-1 for layout int8). Returns the faults. */
MG_TARGET static int grid_of(const float *x, size_t count, int bits, uint16_t *half, float *scale, int *zero) {
    float low, high;
    range_of(x, count, &low, &high);
    if (isnan(low))
        return NOT_FINITE;
    low = bits == 4 && low > 0 ? 0 : low;
    high = bits == 4 && high < 0 ? 0 : high;
    /* Divided before the subtraction: the range of float32's extremes would overflow. */
    float step = bits == 4 ? high / 15.0f - low / 15.0f : (-low > high ? -low : high) / 127.0f;
    step = step == 0 ? 1.0f : step;
    *half = _cvtss_sh(step, _MM_FROUND_TO_NEAREST_INT);
    *scale = _cvtsh_ss(*half);
    float place = rintf(-low / *scale);
    *zero = bits == 8 ? -1 : place < 0 ? 0 : place > 15 ? 15 : (int)place;
    return step < HALF_LEAST || step > HALF_MOST ? NOT_HALF : 0;
}

/* Scales (rows, groups) float16, zero points (layout int4; else unused) and codes of every group, and ‖w‖², ‖w - ŵ‖²
 * of every row. Returns the faults: outputs are to be used only if there are none. */
MG_EXPORT int mg_group_quantize(const void *values, int dtype, size_t rows, size_t columns, size_t group, int bits,
                                uint16_t *scales, uint8_t *zeros, uint8_t *codes, double *signal, double *noise,
                                int threads) {
    mg_matrix m = {values, dtype, rows, columns, group, (columns + group - 1) / group};
    size_t padded = m.groups * group, width = padded * (size_t)bits / 8;
    int faults = 0;
#pragma omp parallel num_threads(threads) reduction(| : faults)
    {
        float *row = calloc(padded + LANES, sizeof(float));
        uint8_t *wide = malloc(padded + 32);
        if (!row || !wide)
            faults = NO_MEMORY;
#pragma omp for
        for (size_t r = 0; r < rows; r++) {
            if (faults)
                continue;
            widen(&m, r, row);
            mg_energy sum = {0, 0};
            for (size_t g = 0; g < m.groups; g++) {
                size_t at = r * m.groups + g;
                float scale;
                int zero;
                faults |= grid_of(row + g * group, group, bits, scales + at, &scale, &zero);
                if (bits == 4)
                    zeros[at] = (uint8_t)zero;
                mg_energy one = round_group(row + g * group, group, scale, zero, wide + g * group);
                sum.signal += one.signal;
                sum.noise += one.noise;
            }
            signal[r] = sum.signal;
            noise[r] = sum.noise;
            if (bits == 4)
                pack_nibbles(wide, padded, codes + r * width);
            else
                memcpy(codes + r * width, wide, width);
        }
        free(row);
        free(wide);
    }
    return faults;
}
