/* What the C files share. Exported functions are called by ctypes; they check nothing, their Python callers do.
 *
 * Weights of 4 bits lie in panels of PANEL output columns, cut into blocks of `width` input columns (a multiple of
 * UNIT); one block is one record:
 *     codes    2 halves of 16 columns, each width/UNIT units of 128 bytes
 *     scales   float[PANEL]
 *     zeros    uint8[PANEL]            (absent in a look-up layout)
 * A unit holds UNIT inputs of 16 columns: lane l of 16 bytes in quarter i has column 4l + i, one input a byte; quarters
 * 0 and 1 are the low and the high nibbles of the first 64 bytes, 2 and 3 those of the last. In a look-up layout each
 * panel starts with its tables: int8 per half, quarter, lane, entry. `matmul.prepack` writes all this.
 */
#ifndef MODELGROVE_H
#define MODELGROVE_H

#include <stddef.h>
#include <stdint.h>

#define MG_EXPORT __attribute__((visibility("default")))
#define MG_INLINE static inline __attribute__((always_inline))
#define MG_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define MG_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")))

enum { MG_AVX2 = 1, MG_AVX512VNNI = 2 };
enum { PANEL = 32, UNIT = 16, TABLE = 16, TABLES = PANEL * TABLE };

/* A prepacked weight; `tables` says whether it is of a look-up layout. */
typedef struct {
    const uint8_t *data;
    size_t blocks, width, tables;
} mg_weight;

/* A panel made ready for the tiles: bytes [block][half][width / 4][16 columns][4 inputs], and per block and column the
 * scale and a term that the tile needs: the zero point as a float, or -128 times the sum of the block's weights. */
typedef struct {
    uint8_t *values;
    float *scales;
    void *terms;
} mg_panel;

/* Activations as a tile reads them: `codes` of row r at r * stride, sums over each block at r * blocks (or unused). */
typedef struct {
    const uint8_t *codes;
    size_t stride;
    const float *sums;
} mg_rows;

/* One instruction set's way to multiply with one layout. */
typedef struct {
    size_t tile;      /* rows that a tile takes at most */
    size_t bytes;     /* bytes that an activation takes */
    /* int8 codes of a row → what the tile reads, and their sums over blocks. */
    void (*encode)(const int8_t *codes, size_t count, size_t width, uint8_t *out, float *sums);
    void (*unpack)(const mg_weight *weight, size_t panel, mg_panel *out);
    /* sums[r][PANEL] = Σ_block scale · Σ_k a · w for `count` ≤ tile rows. */
    void (*multiply)(const mg_weight *weight, const mg_panel *panel, mg_rows rows, size_t count, float *sums);
    /* The same for one row of int8 codes, from the packed weight. */
    void (*vector)(const mg_weight *weight, size_t panel, const int8_t *codes, float *sums);
} mg_layout;

/* One instruction set. */
typedef struct {
    mg_layout int4, lut;
    /* bits of max|x / smooth|; `out` receives x / smooth. Exact division is left to the caller where `inverse` is NULL. */
    uint32_t (*smooth)(const float *x, const float *smooth, const float *inverse, size_t count, float *out);
    /* round(x / scale) for |x| ≤ 127 · scale, scale of moderate size. */
    void (*quantize)(const float *x, float scale, size_t count, int8_t *codes);
    /* out[r][0:columns] = factor[r] · sums[r][0:columns] + a[r] · b + bias, with b (depth, columns), columns 16 or 32
     * and sums a tile's; without sums if `factor` is NULL. */
    void (*combine)(const float *a, size_t stride, const float *b, size_t depth, size_t columns, const float *factor,
                    const float *sums, const float *bias, size_t count, float *out, size_t out_stride);
} mg_isa;

extern const mg_isa mg_isa_avx2, mg_isa_avx512vnni;
const mg_isa *mg_isa_of(int number);

/* Inputs, and the same padded to whole blocks, in a group; bytes of a weight's record and panel. */
MG_INLINE size_t mg_record(const mg_weight *weight) {
    return PANEL * (weight->width / 2 + sizeof(float) + (weight->tables ? 0 : 1));
}
MG_INLINE const uint8_t *mg_block(const mg_weight *weight, size_t panel, size_t block) {
    size_t header = weight->tables ? TABLES : 0;
    return weight->data + panel * (header + weight->blocks * mg_record(weight)) + header + block * mg_record(weight);
}
MG_INLINE const int8_t *mg_tables(const mg_weight *weight, size_t panel) {
    return (const int8_t *)weight->data + panel * (TABLES + weight->blocks * mg_record(weight));
}

#endif
