/// The part of cuBLASLt used here. It is declared by hand and opened when the backend starts, so neither building nor loading needs the
/// CUDA toolkit's math libraries.
///
/// Names, values and layouts are those of cublasLt.h in CUDA 12 and 13, a stable binary interface to which values are only ever added. The
/// scale modes exist since 12.8, the vector modes since 12.9. An older library refuses their attributes, which callers treat as "not
/// supported".
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace uniflow::cuda {

/// Opens the library, once per process. Returns "", or why it cannot be used, with one line for each file tried. The path in the
/// environment variable UNIFLOW_CUBLASLT is tried first, then the linker's search path, then the install locations of toolkits and Python
/// wheels: in the active environment, and in those whose programs are on the PATH.
std::string open_cublaslt();

/// The names and existing files that open_cublaslt() tries, in order.
std::vector<std::string> cublaslt_files();

/// "13.0.2", or "" if it is not open.
std::string cublaslt_version();

namespace lt {

using Handle = struct HandleData*;          // cublasLtHandle_t
using Operation = struct OperationData*;    // cublasLtMatmulDesc_t
using Layout = struct LayoutData*;          // cublasLtMatrixLayout_t
using Preference = struct PreferenceData*;  // cublasLtMatmulPreference_t

/// cublasStatus_t
enum class Status : int {
  Success = 0,
  NotInitialized = 1,
  AllocFailed = 3,
  InvalidValue = 7,
  ArchMismatch = 8,
  MappingError = 11,
  ExecutionFailed = 13,
  InternalError = 14,
  NotSupported = 15,
};

/// cudaDataType_t
enum class DataType : int32_t { Float32 = 0, BFloat16 = 14, Float8E4M3 = 28 };

/// cublasComputeType_t: products and sums in float32; float32 inputs are not rounded to TF32.
enum class Compute : int { Float32 = 68 };

/// cublasOperation_t
enum class Transpose : int32_t { No = 0, Yes = 1 };

/// cublasLtMatmulDescAttributes_t, with the type of each value.
enum class OperationAttribute : int {
  TransposeA = 3,         // Transpose
  TransposeB = 4,         // Transpose
  Epilogue = 7,           // uint32_t of kEpilogue...
  BiasPointer = 8,        // const void*, one number per row of D
  ScalePointerA = 17,     // const float*
  ScalePointerB = 18,     // const float*
  FastAccumulation = 25,  // int8_t: 1 keeps the sums of float8 products in fewer bits
  BiasType = 26,          // DataType
  ScaleModeA = 31,        // ScaleMode
  ScaleModeB = 32,        // ScaleMode
};

/// cublasLtEpilogue_t: Default alone, or the sum of the others. GELU is the tanh variant.
constexpr uint32_t kEpilogueDefault = 1, kEpilogueBias = 4, kEpilogueGelu = 32;

/// cublasLtMatmulMatrixScale_t: one number for the matrix, or one per row of op(A) and per column of op(B).
enum class ScaleMode : int32_t { Scalar = 0, OuterVector = 3 };

/// cublasLtMatmulPreferenceAttributes_t
enum class PreferenceAttribute : int {
  WorkspaceBytes = 1,    // uint64_t, the limit
  ReductionSchemes = 3,  // uint32_t of kReduce...
  AlignmentA = 5,        // uint32_t, bytes; the others follow
  AlignmentB = 6,
  AlignmentC = 7,
  AlignmentD = 8,
};

/// cublasLtReductionScheme_t: partial sums are kept in float32 and added in order.
constexpr uint32_t kReduceInComputeType = 2;

/// cublasLtMatmulAlgo_t
struct Algorithm {
  uint64_t data[8];
};

/// cublasLtMatmulHeuristicResult_t
struct Candidate {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status status;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Candidate) == 96 && offsetof(Candidate, status) == 72);

/// The functions; their names in the library have the prefix "cublasLt". D = epilogue(alpha op(A) op(B) + beta C), in column-major order.
struct Library {
  Status (*create)(Handle*);
  size_t (*get_version)();
  Status (*operation_create)(Operation*, Compute, DataType scale_type);
  Status (*operation_destroy)(Operation);
  Status (*operation_set)(Operation, OperationAttribute, const void* value, size_t bytes);
  Status (*layout_create)(Layout*, DataType, uint64_t rows, uint64_t columns, int64_t leading);
  Status (*layout_destroy)(Layout);
  Status (*preference_create)(Preference*);
  Status (*preference_destroy)(Preference);
  Status (*preference_set)(Preference, PreferenceAttribute, const void* value, size_t bytes);
  Status (*heuristic)(Handle, Operation, Layout a, Layout b, Layout c, Layout d, Preference, int wanted, Candidate* results, int* count);
  Status (*matmul)(Handle, Operation, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta, const void* c,
                   Layout, void* d, Layout, const Algorithm*, void* workspace, size_t workspace_bytes, void* stream);
};

/// Throws Error(Unsupported) if the library cannot be opened.
const Library& library();

/// If the call failed, throws Error(OutOfMemory) or Error(Internal) with its name.
void check(Status status, const char* call);

}  // namespace lt
}  // namespace uniflow::cuda
