/* Which instruction sets this CPU and its operating system have. */
#include "modelgrove.h"

/* The best set: 0 none of ours, MG_AVX2, MG_AVX512VNNI. */
MG_EXPORT int mg_best_isa(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return 0;
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    return wide ? MG_AVX512VNNI : MG_AVX2;
}
