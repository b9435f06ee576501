#include "kernels.h"

#ifdef LINESCAN_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")
#endif
#define LINESCAN_WIDTH 16
#define LINESCAN_ISA avx512
#include "instruction_set.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
