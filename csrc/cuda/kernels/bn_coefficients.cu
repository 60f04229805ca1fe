// Compiles the kernel of bn_coefficients, see ../launches.h.

#include "bn_coefficients.cuh"
