// Four lanes, which every 64-bit processor has (SSE2, NEON).
#include "kernels.h"

#define LINESCAN_WIDTH 4
#define LINESCAN_ISA baseline
#include "instruction_set.h"
