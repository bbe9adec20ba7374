/* What the C files share. Exported functions are called by ctypes; they check nothing, their Python callers do. */
#ifndef MODELGROVE_H
#define MODELGROVE_H

#include <stddef.h>
#include <stdint.h>

#define MG_EXPORT __attribute__((visibility("default")))
#define MG_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define MG_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")))

enum { MG_AVX2 = 1, MG_AVX512VNNI = 2 };

#endif
