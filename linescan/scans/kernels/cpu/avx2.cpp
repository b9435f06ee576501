#include "kernels.h"

#ifdef LINESCAN_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#define LINESCAN_WIDTH 8
#define LINESCAN_ISA avx2
#include "instruction_set.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
