/* Both ends of the convolution: float pixels to padded int8 ones, sums to float pixels; either memory format. */
#include "conv2d.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

/* Mirrored by `_Pixels` in conv_native.py. */
typedef struct {
    const float *x;      /* (images, channels, height, width), or channels last */
    const float *smooth; /* (channels) or NULL */
    int8_t *codes;       /* (images, padded_height, padded_width, channels) */
    float *scales;       /* (images) */
    int64_t images, channels, height, width, top, left, padded_height, padded_width;
    int32_t channels_last, threads;
} mg_pixels;

/* The greatest |x| by its bits, which order as the values do; infinities and NaN are above all others. */
MG_TARGET_AVX2 static int32_t greatest(const float *x, int64_t count) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most;
}

MG_TARGET_AVX2 static int32_t greatest_quotient(const float *x, const float *by, int64_t count) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        float value = x[i] / by[i];
        int32_t bits;
        memcpy(&bits, &value, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most;
}

/* One part of an image: a plane of a channel, or, channels last, a row. */
static int32_t greatest_of_part(const mg_pixels *p, int64_t image, int64_t part) {
    int64_t size = p->channels_last ? p->width * p->channels : p->height * p->width;
    const float *x = p->x + image * p->channels * p->height * p->width + part * size;
    if (!p->smooth)
        return greatest(x, size);
    int32_t most = 0;
    if (p->channels_last) {
        for (int64_t pixel = 0; pixel < p->width; pixel++) {
            int32_t bits = greatest_quotient(x + pixel * p->channels, p->smooth, p->channels);
            most = bits > most ? bits : most;
        }
        return most;
    }
    /* Rounded division by one number keeps the order. */
    int32_t bits = greatest(x, size);
    float value;
    memcpy(&value, &bits, sizeof value);
    value /= p->smooth[part];
    return greatest(&value, 1);
}

/* x → round(x / scale), in [-127, 127]. */
MG_TARGET_AVX2 static inline __m256i quantize(__m256 x, float scale) {
    const __m256 limit = _mm256_set1_ps(127), least = _mm256_set1_ps(-127);
    __m256 steps = _mm256_div_ps(x, _mm256_set1_ps(scale));
    return _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(steps, limit), least));
}

MG_TARGET_AVX2 static inline __m256i first(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(count < 8 ? count : 8)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* Eight floats, those from `count` on zero. */
MG_TARGET_AVX2 static inline __m256 load(const float *from, int64_t count) {
    return count >= 8 ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, first(count));
}

static inline void put(int8_t *codes, int64_t bytes, int64_t count) {
    if (count >= 8)
        memcpy(codes, &bytes, 8);
    else
        memcpy(codes, &bytes, (size_t)count);
}

MG_TARGET_AVX2 static void quantize_pixel(const mg_pixels *p, const float *x, float scale, int8_t *codes) {
    for (int64_t c = 0; c < p->channels; c += 8) {
        int64_t left = p->channels - c;
        __m256 values = load(x + c, left);
        if (p->smooth)
            values = _mm256_div_ps(values, load(p->smooth + c, left));
        __m256i steps = quantize(values, scale);
        __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(steps), _mm256_extracti128_si256(steps, 1));
        put(codes + c, _mm_cvtsi128_si64(_mm_packs_epi16(words, words)), left);
    }
}

/* Up to four channels of up to eight pixels, the bytes of a pixel together. */
MG_TARGET_AVX2 static inline __m256i quantize_four(const mg_pixels *p, const float *x, float scale, int64_t channel,
                                                   int64_t channels, int64_t pixels) {
    __m256i bytes = _mm256_setzero_si256();
    for (int i = 0; i < 4 && i < channels; i++) {
        __m256 values = load(x + (channel + i) * p->height * p->width, pixels);
        if (p->smooth)
            values = _mm256_div_ps(values, _mm256_set1_ps(p->smooth[channel + i]));
        __m256i steps = _mm256_and_si256(quantize(values, scale), _mm256_set1_epi32(255));
        bytes = _mm256_or_si256(bytes, _mm256_slli_epi32(steps, 8 * i));
    }
    return bytes;
}

/* Up to eight channels of up to eight pixels of a row, from planes. */
MG_TARGET_AVX2 static inline void gather(const mg_pixels *p, const float *x, float scale, int64_t channel,
                                         int64_t channels, int64_t pixels, int8_t *codes) {
    __m256i low = quantize_four(p, x, scale, channel, channels, pixels);
    __m256i high = quantize_four(p, x, scale, channel + 4, channels - 4, pixels);
    int64_t bytes[8];
    /* Unpacking works in halves of four pixels. */
    __m256i even = _mm256_unpacklo_epi32(low, high), odd = _mm256_unpackhi_epi32(low, high);
    _mm256_storeu_si256((__m256i *)bytes, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256((__m256i *)bytes + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    for (int64_t i = 0; i < pixels; i++)
        put(codes + i * p->channels + channel, bytes[i], channels);
}

MG_TARGET_AVX2 static void gather_pixels(const mg_pixels *p, const float *x, float scale, int64_t channel,
                                         int64_t pixels, int8_t *codes) {
    int64_t channels = p->channels - channel;
    if (pixels >= 8 && channels >= 8)
        gather(p, x, scale, channel, 8, 8, codes);
    else
        gather(p, x, scale, channel, channels < 8 ? channels : 8, pixels < 8 ? pixels : 8, codes);
}

static void quantize_row(const mg_pixels *p, int64_t image, int64_t row) {
    int64_t c = p->channels;
    int8_t *codes = p->codes + (image * p->padded_height + row + p->top) * p->padded_width * c;
    memset(codes, 0, (size_t)(p->left * c));
    codes += p->left * c;
    memset(codes + p->width * c, 0, (size_t)((p->padded_width - p->left - p->width) * c));
    const float *x = p->x + image * c * p->height * p->width + row * p->width * (p->channels_last ? c : 1);
    float scale = p->scales[image];
    if (p->channels_last) {
        for (int64_t i = 0; i < p->width; i++)
            quantize_pixel(p, x + i * c, scale, codes + i * c);
        return;
    }
    /* Sixteen pixels are a cache line of a plane. */
    for (int64_t line = 0; line < p->width; line += 16)
        for (int64_t channel = 0; channel < c; channel += 8)
            for (int64_t i = line; i < line + 16 && i < p->width; i += 8)
                gather_pixels(p, x + i, scale, channel, p->width - i, codes + i * c);
}

static float scale_of(int32_t bits) {
    float most;
    memcpy(&most, &bits, sizeof most);
    if (!isfinite(most))
        return NAN;
    return most / 127.0f > 0 ? most / 127.0f : 1.0f;
}

MG_EXPORT void mg_conv_quantize(const mg_pixels *p) {
    int64_t parts = p->channels_last ? p->height : p->channels;
    for (int64_t image = 0; image < p->images; image++) {
        int32_t most = 0;
#pragma omp parallel for num_threads(p->threads) reduction(max : most)
        for (int64_t part = 0; part < parts; part++) {
            int32_t bits = greatest_of_part(p, image, part);
            most = bits > most ? bits : most;
        }
        p->scales[image] = scale_of(most);
    }
#pragma omp parallel for num_threads(p->threads) collapse(2)
    for (int64_t image = 0; image < p->images; image++)
        for (int64_t row = -p->top; row < p->padded_height - p->top; row++) {
            size_t size = (size_t)(p->padded_width * p->channels);
            if (row < 0 || row >= p->height)
                memset(p->codes + (image * p->padded_height + row + p->top) * (int64_t)size, 0, size);
            else
                quantize_row(p, image, row);
        }
}

MG_TARGET_AVX2 static void transpose(__m256 v[8]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

MG_TARGET_AVX2 static inline void put_floats(float *y, __m256 values, int64_t count) {
    if (count >= 8)
        _mm256_storeu_ps(y, values);
    else
        _mm256_maskstore_ps(y, first(count), values);
}

/* Up to 8 pixels × 8 output channels; `pitch` is the distance of two channels, or of two pixels if channels are last. */
MG_TARGET_AVX2 static void store_block(const mg_conv_task *task, const mg_conv *conv, const float *sums, float scale,
                                       int64_t pixels, __m256 bias, int64_t columns, float *y, int64_t pitch) {
    __m256 v[8];
    for (int64_t i = 0; i < 8; i++) {
        __m256 row = i < pixels ? _mm256_loadu_ps(sums + i * task->stride) : _mm256_setzero_ps();
        v[i] = _mm256_add_ps(_mm256_mul_ps(row, _mm256_set1_ps(scale)), bias);
    }
    if (!conv->channels_last)
        transpose(v);
    int64_t lines = conv->channels_last ? pixels : columns, length = conv->channels_last ? columns : pixels;
    if (lines >= 8 && length >= 8)
        for (int64_t i = 0; i < 8; i++)
            _mm256_storeu_ps(y + i * pitch, v[i]);
    else
        for (int64_t i = 0; i < 8 && i < lines; i++)
            put_floats(y + i * pitch, v[i], length);
}

/* Neighbouring pixels of one image. */
MG_TARGET_AVX2 static void store_pixels(const mg_conv_task *task, const mg_conv *conv, const float *sums, int64_t image,
                                        int64_t pixel, int64_t pixels, int64_t first_column, int64_t columns) {
    int64_t area = conv->height * conv->width, last = conv->channels_last;
    float *y = conv->y + image * conv->out * area + (last ? pixel * conv->out + first_column : first_column * area + pixel);
    for (int64_t column = 0; column < columns; column += 8) {
        int64_t left = columns - column;
        __m256 bias = conv->bias ? load(conv->bias + first_column + column, left) : _mm256_setzero_ps();
        /* Sixteen pixels are a cache line of a plane. */
        for (int64_t i = 0; i < pixels; i += 8)
            store_block(task, conv, sums + i * task->stride + column, conv->x_scales[image], pixels - i, bias, left,
                        y + (last ? i * conv->out + column : column * area + i), last ? conv->out : area);
    }
}

void mg_conv_store(const mg_conv_task *task, const mg_conv *conv, int64_t first_row, int64_t rows,
                   int64_t first_column, int64_t columns) {
    int64_t area = conv->height * conv->width;
    for (int64_t row = 0, count; row < rows; row += count) {
        int64_t pixel = (first_row + row) % area, image = (first_row + row) / area;
        count = rows - row < 16 ? rows - row : 16;
        count = count < area - pixel ? count : area - pixel;
        store_pixels(task, conv, task->sums + row * task->stride, image, pixel, count, first_column, columns);
    }
}
