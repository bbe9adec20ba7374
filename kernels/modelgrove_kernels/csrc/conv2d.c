/* The loops around the multiplication: tasks of pixels × output channels, blocks of K, patches read from the image. */
#include "conv2d.h"

#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

MG_EXPORT int64_t mg_conv_scratch(void) {
    return (int64_t)((sizeof(mg_conv_task) + 63) / 64 * 64);
}

static int64_t round_up(int64_t value, int64_t unit) {
    return (value + unit - 1) / unit * unit;
}

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* The columns [start, start + count) of K at output pixel `pixel`: a run of channels for each tap. */
static void copy_patch(const mg_conv *conv, int64_t pixel, int64_t start, int64_t count, uint8_t *target) {
    int64_t x = pixel % conv->width, y = pixel / conv->width % conv->height;
    int64_t image = pixel / conv->width / conv->height;
    int64_t end = smaller(start + count, conv->kernel[0] * conv->kernel[1] * conv->channels);
    const int8_t *corner = conv->x + ((image * conv->padded_height + y * conv->stride[0]) * conv->padded_width +
                                      x * conv->stride[1]) * conv->channels;
    memset(target + (end - start), 0, (size_t)(start + count - end));
    for (int64_t k = start; k < end;) {
        int64_t tap = k / conv->channels, channel = k % conv->channels;
        int64_t run = smaller(conv->channels - channel, end - k);
        int64_t down = tap / conv->kernel[1] * conv->dilation[0], right = tap % conv->kernel[1] * conv->dilation[1];
        memcpy(target, corner + (down * conv->padded_width + right) * conv->channels + channel, (size_t)run);
        target += run;
        k += run;
    }
}

static void copy_patches(const mg_conv *conv, mg_conv_task *task, int64_t first_row, int64_t rows) {
    const mg_slice *last = task->slices + task->slice_count - 1;
    int64_t start = task->slices->start, count = last->start + last->length - start;
    for (int64_t row = 0; row < rows; row++)
        copy_patch(conv, first_row + row, start, count, task->a + row * MG_CONV_DEPTH);
    for (int64_t row = rows; row < task->rows; row++)
        memset(task->a + row * MG_CONV_DEPTH, 0, (size_t)count);
}

/* The slices of the block that begins at column `start`; returns where it ends. */
static int64_t cut_block(const mg_conv *conv, mg_conv_task *task, int64_t start) {
    int64_t longest = conv->isa == MG_AVX2 && conv->bits == 4 ? 64 : MG_CONV_DEPTH;
    int64_t limit = smaller(start + MG_CONV_DEPTH, conv->depth);
    task->slice_count = 0;
    while (start < limit) {
        int64_t group = smaller(start / conv->group, conv->groups - 1);
        int64_t end = group == conv->groups - 1 ? conv->depth : (group + 1) * conv->group;
        int64_t length = smaller(longest, end - start);
        if (start + length > limit) {
            if (task->slice_count)
                break;
            length = limit - start;
        }
        task->slices[task->slice_count++] = (mg_slice){(int32_t)start, (int32_t)length, (int32_t)group};
        start += length;
    }
    return start;
}

static void run_task(const mg_conv *conv, mg_conv_task *task, int64_t first_row, int64_t rows, int64_t first_panel,
                     int64_t panels) {
    int wide = conv->isa == MG_AVX512VNNI;
    task->rows = (int)round_up(rows, MG_CONV_TILE);
    task->stride = panels * MG_CONV_PANEL;
    memset(task->sums, 0, sizeof(float) * (size_t)(task->rows * task->stride));
    for (int64_t start = 0; start < conv->depth;) {
        start = cut_block(conv, task, start);
        copy_patches(conv, task, first_row, rows);
        if (wide)
            mg_conv_rows_avx512(task);
        else
            mg_conv_rows_avx2(task, conv->bits);
        for (int64_t panel = 0; panel < panels; panel++)
            (wide ? mg_conv_panel_avx512 : mg_conv_panel_avx2)(task, conv, first_panel + panel, panel * MG_CONV_PANEL);
    }
    int64_t first_column = first_panel * MG_CONV_PANEL;
    mg_conv_store(task, conv, first_row, rows, first_column, smaller(panels * MG_CONV_PANEL, conv->out - first_column));
}

/* Every output number is summed in the same order whatever the number of threads. */
MG_EXPORT void mg_conv_run(const mg_conv *conv) {
    int64_t pixels = conv->images * conv->height * conv->width;
    int64_t all_panels = (conv->out + MG_CONV_PANEL - 1) / MG_CONV_PANEL;
    int64_t bands = (pixels + MG_CONV_ROWS - 1) / MG_CONV_ROWS;
    int64_t rows = round_up((pixels + bands - 1) / bands, MG_CONV_TILE);
    int64_t panels = smaller(MG_CONV_WIDTH / MG_CONV_PANEL, all_panels);
    while (panels > 1 && bands * ((all_panels + panels - 1) / panels) < 4 * conv->threads && conv->threads > 1)
        panels = (panels + 1) / 2;
    int64_t columns = (all_panels + panels - 1) / panels;
#pragma omp parallel for num_threads(conv->threads) schedule(dynamic) collapse(2)
    for (int64_t band = 0; band < bands; band++)
        for (int64_t column = 0; column < columns; column++) {
#ifdef _OPENMP
            mg_conv_task *task = (mg_conv_task *)(conv->scratch + omp_get_thread_num() * mg_conv_scratch());
#else
            mg_conv_task *task = (mg_conv_task *)conv->scratch;
#endif
            int64_t left = pixels - band * rows;
            if (left > 0)
                run_task(conv, task, band * rows, smaller(rows, left), column * panels,
                         smaller(panels, all_panels - column * panels));
        }
}
