/* y = x' · Wᵀ + (x' · downᵀ) · upᵀ + bias with x' = x / smooth: rows are quantized first, each once, then panels of the
 * weight meet blocks of rows. No sum's order depends on the threads. */
#include "modelgrove.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

enum {
    CHUNK = 12,            /* rows that are prepared together: a multiple of all tiles of `combine` */
    VECTOR_ROWS = 3,       /* up to so many rows meet the packed weight one by one */
    BLOCK_BYTES = 1 << 19, /* of activations, which should stay in the second-level cache */
    TILE_MOST = 12,
    BRANCH = 32,           /* ranks that `combine` takes at once */
};

/* Magnitudes between which division by corrected reciprocals is exact: 2^-60 and 2^60. */
static const uint32_t MODERATE_LOW = (127u - 60) << 23, MODERATE_HIGH = (127u + 60) << 23, INFINITE = 255u << 23;

/* `smooth`, `down`, `up` and `bias` may be NULL. `down` has panels of BRANCH ranks, the last of 16 or 32, each
 * (depth, ranks); `up` is (panels, rank, PANEL). A group of `group` inputs is padded to `padded`, a multiple of `width`. */
typedef struct {
    const float *x, *smooth, *down, *up, *bias;
    const uint8_t *weight;
    float *y;
    int64_t rows, depth, columns, group, padded, width, rank, lut, threads, isa;
} mg_linear_call;

/* What the threads share. */
typedef struct {
    const mg_linear_call *call;
    const mg_isa *isa;
    const mg_layout *layout;
    mg_weight weight;
    size_t padded, stride; /* inputs of a row in whole blocks; bytes between rows of codes */
    uint8_t *codes;
    float *scales, *sums, *branch, *inverse;
} work;

/* What a thread has to itself. */
typedef struct {
    float *smoothed;
    int8_t *plain, *spaced;
    mg_panel panel;
    float *tile;
} scratch;

const mg_isa *mg_isa_of(int number) { return number == MG_AVX512VNNI ? &mg_isa_avx512vnni : &mg_isa_avx2; }

static size_t least(size_t a, size_t b) { return a < b ? a : b; }
static size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }
static int is_moderate(uint32_t bits) { return bits >= MODERATE_LOW && bits <= MODERATE_HIGH; }

static uint32_t magnitude(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7FFFFFFF;
}

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* 1 / smooth if all are of moderate size, else NULL. */
static float *inverses(const mg_linear_call *call, float *inverse) {
    if (!call->smooth)
        return NULL;
    for (int64_t k = 0; k < call->depth; k++) {
        if (!is_moderate(magnitude(call->smooth[k])))
            return NULL;
        inverse[k] = 1.0f / call->smooth[k];
    }
    return inverse;
}

static void quantize_exactly(const float *x, float scale, size_t count, int8_t *codes) {
    for (size_t k = 0; k < count; k++) {
        float value = rintf(x[k] / scale);
        codes[k] = (int8_t)(value > 127 ? 127 : value < -127 ? -127 : value);
    }
}

/* A row's scale and int8 codes, from x' and the bits of its largest magnitude. NaN marks a row that is not finite. */
static float quantize_row(const mg_isa *isa, const float *x, uint32_t largest, size_t count, int8_t *codes) {
    float scale = from_bits(largest) / 127.0f;
    if (largest >= INFINITE || scale == 0) {
        memset(codes, 0, count);
        return scale == 0 ? 1 : NAN;
    }
    if (is_moderate(largest))
        isa->quantize(x, scale, count, codes);
    else
        quantize_exactly(x, scale, count, codes);
    return scale;
}

/* Codes with each group padded by zeros to whole blocks. */
static const int8_t *pad_groups(const work *work, const int8_t *plain, int8_t *spaced) {
    size_t depth = work->call->depth, group = work->call->group, padded = work->call->padded;
    if (work->padded == depth)
        return plain;
    memset(spaced, 0, work->padded);
    for (size_t from = 0, to = 0; from < depth; from += group, to += padded)
        memcpy(spaced + to, plain + from, least(group, depth - from));
    return spaced;
}

static void prepare_row(const work *work, const scratch *own, size_t row, float *smoothed) {
    const mg_linear_call *call = work->call;
    const float *x = call->x + row * call->depth;
    uint32_t largest = work->isa->smooth(x, call->smooth, work->inverse, call->depth, smoothed);
    if (work->inverse && !is_moderate(largest))
        largest = work->isa->smooth(x, call->smooth, NULL, call->depth, smoothed);
    work->scales[row] = quantize_row(work->isa, call->smooth ? smoothed : x, largest, call->depth, own->plain);
    const int8_t *codes = pad_groups(work, own->plain, own->spaced);
    uint8_t *out = work->codes + row * work->stride;
    if (call->rows <= VECTOR_ROWS)
        memcpy(out, codes, work->padded);
    else
        work->layout->encode(codes, work->padded, call->width, out, work->sums + row * work->weight.blocks);
}

/* Smoothing, quantization and the down-projection of some rows. */
static void prepare(const work *work, const scratch *own, size_t first, size_t count) {
    const mg_linear_call *call = work->call;
    for (size_t r = 0; r < count; r++)
        prepare_row(work, own, first + r, own->smoothed + r * call->depth);
    const float *x = call->smooth ? own->smoothed : call->x + first * call->depth;
    for (size_t rank = 0; rank < (size_t)call->rank; rank += BRANCH) {
        size_t ranks = least(BRANCH, call->rank - rank);
        work->isa->combine(x, call->depth, call->down + rank * call->depth, call->depth, ranks, NULL, NULL, NULL,
                           count, work->branch + first * call->rank + rank, call->rank);
    }
}

/* Scales, branch and bias on a tile of sums, which then goes to y. */
static void finish(const work *work, const scratch *own, size_t panel, size_t first, size_t count) {
    const mg_linear_call *call = work->call;
    size_t column = panel * PANEL, columns = least(PANEL, call->columns - column);
    float padded[PANEL] = {0}, *y = call->y + first * call->columns + column;
    const float *bias = call->bias ? call->bias + column : NULL;
    int whole = columns == PANEL;
    if (bias && !whole)
        bias = memcpy(padded, bias, columns * sizeof(float));
    work->isa->combine(work->branch + first * call->rank, call->rank, call->up + panel * call->rank * PANEL, call->rank,
                       PANEL, work->scales + first, own->tile, bias, count, whole ? y : own->tile,
                       whole ? (size_t)call->columns : PANEL);
    for (size_t r = 0; r < count && !whole; r++)
        memcpy(y + r * call->columns, own->tile + r * PANEL, columns * sizeof(float));
}

/* Asks for the lines of y that a tile will be written to, while it is computed. */
static void prefetch(const work *work, size_t panel, size_t first, size_t count) {
    for (size_t r = 0; r < count; r++) {
        const float *y = work->call->y + (first + r) * work->call->columns + panel * PANEL;
        __builtin_prefetch(y, 1);
        __builtin_prefetch(y + 16, 1);
    }
}

static void multiply_block(const work *work, const scratch *own, size_t panel, size_t first, size_t end) {
    work->layout->unpack(&work->weight, panel, (mg_panel *)&own->panel);
    for (size_t row = first; row < end; row += work->layout->tile) {
        size_t count = least(work->layout->tile, end - row);
        mg_rows rows = {work->codes + row * work->stride, work->stride, work->sums + row * work->weight.blocks};
        prefetch(work, panel, row, count);
        work->layout->multiply(&work->weight, &own->panel, rows, count, own->tile);
        finish(work, own, panel, row, count);
    }
}

static void multiply_vectors(const work *work, const scratch *own, size_t panel) {
    for (size_t row = 0; row < (size_t)work->call->rows; row++) {
        work->layout->vector(&work->weight, panel, (const int8_t *)work->codes + row * work->stride, own->tile);
        finish(work, own, panel, row, 1);
    }
}

/* Rows of a block: they fit into BLOCK_BYTES, are whole tiles, and leave some tasks to each thread. */
static size_t rows_of_block(const work *work, size_t panels) {
    size_t rows = work->call->rows, tile = work->layout->tile, tasks = 4 * work->call->threads;
    size_t most = BLOCK_BYTES / work->stride;
    if (panels < tasks)
        most = least(most, rows * panels / tasks);
    if (most < 4 * tile)
        most = 4 * tile;
    size_t blocks = (rows + most - 1) / most;
    return round_up((rows + blocks - 1) / blocks, tile);
}

static void run(const work *work, const scratch *own) {
    size_t rows = work->call->rows, panels = (work->call->columns + PANEL - 1) / PANEL;
    size_t step = rows_of_block(work, panels), blocks = (rows + step - 1) / step;
#pragma omp for schedule(dynamic)
    for (size_t first = 0; first < rows; first += CHUNK)
        prepare(work, own, first, least(CHUNK, rows - first));
    if (rows <= VECTOR_ROWS) {
#pragma omp for schedule(static)
        for (size_t panel = 0; panel < panels; panel++)
            multiply_vectors(work, own, panel);
        return;
    }
#pragma omp for schedule(dynamic)
    for (size_t task = 0; task < blocks * panels; task++) {
        size_t first = task / panels * step;
        multiply_block(work, own, task % panels, first, least(first + step, rows));
    }
}

/* The next `bytes` of an arena, on a cache line; with `base` NULL only counts. */
static void *take(uint8_t *base, size_t *used, size_t bytes) {
    size_t at = *used;
    *used = at + round_up(bytes, 64);
    return base ? base + at : NULL;
}

static size_t share_out(work *work, uint8_t *base) {
    const mg_linear_call *call = work->call;
    size_t used = 0, rows = round_up(call->rows, TILE_MOST), blocks = work->weight.blocks;
    work->codes = take(base, &used, rows * work->stride);
    work->scales = take(base, &used, rows * sizeof(float));
    work->sums = take(base, &used, rows * blocks * sizeof(float));
    work->branch = take(base, &used, rows * call->rank * sizeof(float));
    work->inverse = take(base, &used, call->depth * sizeof(float));
    return used;
}

static size_t take_scratch(const work *work, uint8_t *base, scratch *own) {
    size_t used = 0, depth = work->call->depth, blocks = work->weight.blocks;
    own->smoothed = take(base, &used, work->call->smooth ? CHUNK * depth * sizeof(float) : 0);
    own->plain = take(base, &used, depth);
    own->spaced = take(base, &used, work->padded);
    own->panel.values = take(base, &used, PANEL * work->padded);
    own->panel.scales = take(base, &used, blocks * PANEL * sizeof(float));
    own->panel.terms = take(base, &used, blocks * PANEL * sizeof(float));
    own->tile = take(base, &used, TILE_MOST * PANEL * sizeof(float));
    return used;
}

/* 0, or -1 if there is no memory for the activations. */
MG_EXPORT int mg_linear(const mg_linear_call *call) {
    work work = {.call = call, .isa = mg_isa_of((int)call->isa)};
    work.layout = call->lut ? &work.isa->lut : &work.isa->int4;
    work.padded = (call->depth + call->group - 1) / call->group * call->padded;
    work.weight = (mg_weight){call->weight, work.padded / call->width, call->width, call->lut};
    /* An odd number of cache lines: rows a power of two apart would share the sets of the cache. */
    work.stride = ((work.padded * work.layout->bytes + 63) / 64 | 1) * 64;
    scratch own;
    size_t shared = share_out(&work, NULL), each = take_scratch(&work, NULL, &own);
    /* Not aligned_alloc: glibc would map and unmap fresh pages in each call. */
    void *memory = malloc(shared + call->threads * each + 64);
    if (!memory)
        return -1;
    uint8_t *aligned = (uint8_t *)memory + (-(uintptr_t)memory & 63);
    share_out(&work, aligned);
    work.inverse = inverses(call, work.inverse);
#pragma omp parallel num_threads((int)call->threads) if (call->threads > 1) private(own)
    {
        take_scratch(&work, aligned + shared + omp_get_thread_num() * each, &own);
        run(&work, &own);
    }
    free(memory);
    return 0;
}
