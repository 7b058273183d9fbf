/// The kernel table of one instruction set; compiled once for each.
#include "native/cpu/kernels.h"

#define UNIFLOW_STRING_OF(x) #x
#define UNIFLOW_STRING(x) UNIFLOW_STRING_OF(x)

namespace uniflow::cpu::UNIFLOW_ISA {

UNIFLOW_KERNELS(UNIFLOW_DECLARATION)

extern const Kernels table;
/// dispatch.cpp fills in the common kernels.
const Kernels table = {
    .name = UNIFLOW_STRING(UNIFLOW_ISA),
#if defined(__AVX512BF16__)
    .native_bfloat16 = true,
#else
    .native_bfloat16 = false,
#endif
    UNIFLOW_KERNELS(UNIFLOW_ENTRY)
};

}  // namespace uniflow::cpu::UNIFLOW_ISA
