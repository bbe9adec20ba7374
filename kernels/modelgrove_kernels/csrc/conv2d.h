/* Quantized convolution as an implicit GEMM: y (pixels, out) = patches (pixels, K) · weights (K, out).
 *
 * K runs over taps, then input channels. It is cut into slices: runs of at most MG_CONV_DEPTH columns of one scale,
 * whose integer sums float32 holds exactly. Slices that fit together are a block of the K loop.
 */
#ifndef MODELGROVE_CONV2D_H
#define MODELGROVE_CONV2D_H

#include "modelgrove.h"

enum {
    MG_CONV_PANEL = 32,  /* output channels that are packed and multiplied together */
    MG_CONV_DEPTH = 512, /* columns of K in a block: 512 · 127 · 255 < 2^24 */
    MG_CONV_ROWS = 192,  /* most output pixels of a task */
    MG_CONV_WIDTH = 320, /* most output channels of a task */
    MG_CONV_SLICES = MG_CONV_DEPTH / 8,
    MG_CONV_TILE = 8, /* pixels are padded to whole tiles */
};

typedef struct {
    int32_t start, length, group; /* columns of K, multiples of 8; which scale */
} mg_slice;

/* Mirrored by `_Conv` in conv_native.py. */
typedef struct {
    const int8_t *x;       /* (images, padded_height, padded_width, channels) */
    const float *x_scales; /* (images) */
    const uint8_t *codes;  /* (panels, depth / 8, ...): see conv_panels.py */
    const float *scales;   /* (panels, groups, 32) */
    const uint8_t *zeros;  /* (panels, groups, 32); at 8 bits NULL, all are 128 */
    const float *bias; /* (out) or NULL */
    float *y;          /* (images, out, height, width) or, channels last, (images, height, width, out) */
    uint8_t *scratch;  /* threads · mg_conv_scratch() bytes, aligned to 64 */
    int64_t images, channels, padded_height, padded_width;
    int64_t out, height, width;
    int64_t kernel[2], stride[2], dilation[2];
    int64_t depth;         /* columns of K, padded to a multiple of 8 */
    int64_t groups, group; /* scales of a row, columns of a scale */
    int32_t bits, channels_last, isa, threads;
} mg_conv;

/* What one thread works on: some pixels, some panels, one block of K. Rows of `a` are MG_CONV_DEPTH apart. */
typedef struct {
    uint8_t a[MG_CONV_ROWS * MG_CONV_DEPTH] __attribute__((aligned(64)));
    uint8_t b[MG_CONV_DEPTH * MG_CONV_PANEL] __attribute__((aligned(64)));
    float sums[MG_CONV_ROWS * MG_CONV_WIDTH] __attribute__((aligned(64)));
    /* Of one panel, by slice. */
    float scales[MG_CONV_SLICES][MG_CONV_PANEL] __attribute__((aligned(64)));
    int32_t offsets[MG_CONV_SLICES][MG_CONV_PANEL] __attribute__((aligned(64)));
    /* Only for AVX2, see conv2d_avx2.c. */
    float row_sums[MG_CONV_ROWS][MG_CONV_SLICES];
    uint8_t narrow[MG_CONV_ROWS / 4][MG_CONV_SLICES];
    int8_t rest[MG_CONV_ROWS / 4][MG_CONV_DEPTH / 4][4][4];
    uint8_t rest_quads[MG_CONV_ROWS / 4][MG_CONV_DEPTH / 4];
    uint8_t rest_ends[MG_CONV_ROWS / 4][MG_CONV_SLICES];
    /* The block. */
    mg_slice slices[MG_CONV_SLICES];
    int slice_count;
    int rows; /* whole tiles */
    int64_t stride; /* of `sums` */
} mg_conv_task;

/* One implementation for each instruction set; `panel` counts from 0, `column` is its place in `sums`. */
void mg_conv_rows_avx2(mg_conv_task *task, int bits);
void mg_conv_panel_avx2(mg_conv_task *task, const mg_conv *conv, int64_t panel, int64_t column);
void mg_conv_rows_avx512(mg_conv_task *task);
void mg_conv_panel_avx512(mg_conv_task *task, const mg_conv *conv, int64_t panel, int64_t column);

/* sums · x_scale + bias → y, for `columns` output channels from `first_column`. */
void mg_conv_store(const mg_conv_task *task, const mg_conv *conv, int64_t first_row, int64_t rows,
                   int64_t first_column, int64_t columns);

#endif
