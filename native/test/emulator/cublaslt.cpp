/// Stands in for cuBLASLt: the functions and values of cublasLt.h that native/cuda/cublaslt.h declares, written down here once more, from
/// the real header, so that a mistake in one of the two shows. D = epilogue(alpha op(A) op(B) + beta C) in column-major order, summed
/// in float32. It refuses what the real one refuses, or may refuse, of the types and options that it knows; it knows few.
#include <atomic>
#include <cstring>

#include "native/core/dtype.h"
#include "native/test/emulator/internal.h"

namespace emulator {
namespace {

enum Status { kSuccess = 0, kInvalidValue = 7, kExecutionFailed = 13, kNotSupported = 15 };
enum Type { kFloat32 = 0, kBFloat16 = 14, kE4M3 = 28 };
constexpr int kCompute32F = 68, kScalar = 0, kOuterVector = 3;
constexpr uint32_t kDefault = 1, kBias = 4, kGelu = 32;
constexpr uint64_t kAlgorithm = 0x656d756c61746564;  // in the first word of an algorithm of ours

size_t size_of(int type) { return type == kFloat32 ? 4 : type == kBFloat16 ? 2 : 1; }

struct Operation {
  int transpose_a = 0, transpose_b = 0;
  uint32_t epilogue = kDefault;
  const void* bias = nullptr;
  int bias_type = -1;  // D's
  const float *scale_a = nullptr, *scale_b = nullptr;
  int mode_a = kScalar, mode_b = kScalar;
  int8_t fast_accumulation = 0;  // allowed for e4m3, and ignored here
};

struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t leading;
};

struct Preference {
  uint64_t workspace_bytes = 0;
  uint32_t reduction_schemes = ~0u;
  uint32_t alignments[4] = {256, 256, 256, 256};  // of A, B, C, D
};

enum class Kind : uint64_t { Forwards, Backwards, Failing };

/// The products that an algorithm supports, of any size; any other is refused.
struct Algorithm {
  uint64_t magic;
  Kind kind;
  uint64_t workspace_bytes, problem;
  uint32_t alignments[4];
  uint64_t unused[2];
};
static_assert(sizeof(Algorithm) == 64);

struct Result {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status status;
  float waves;
  int reserved[4];
};

template <class T>
Status read(T& out, const void* value, size_t bytes) {
  if (bytes != sizeof out || !value) return kInvalidValue;
  std::memcpy(&out, value, bytes);
  return kSuccess;
}

struct Sizes {
  uint64_t m, n, k;
};

Status check(const Operation* o, const Layout* a, const Layout* b, const Layout* c, const Layout* d, Sizes& s) {
  if (!o || !a || !b || !c || !d) return kInvalidValue;
  for (const Layout* l : {a, b, c, d})
    if (l->rows == 0 || l->columns == 0 || l->leading < static_cast<int64_t>(l->rows)) return kInvalidValue;
  s = {o->transpose_a ? a->columns : a->rows, o->transpose_b ? b->rows : b->columns, o->transpose_a ? a->rows : a->columns};
  if ((o->transpose_b ? b->columns : b->rows) != s.k || d->rows != s.m || d->columns != s.n || c->rows != s.m || c->columns != s.n)
    return kInvalidValue;

  const bool narrow = a->type == kE4M3;
  for (const Layout* l : {a, b, d})
    if (l->type == kBFloat16 && l->leading % 2 != 0) return kNotSupported;  // rows that begin between two words: may be refused
  if (a->type != b->type || c->type != d->type || d->type == kE4M3 || (a->type == kFloat32 && d->type != kFloat32)) return kNotSupported;
  if ((o->epilogue & ~(kBias | kGelu)) != 0 && o->epilogue != kDefault) return kNotSupported;
  if (o->epilogue & kBias) {
    if (!o->bias) return kInvalidValue;
    if (o->bias_type != -1 && o->bias_type != (narrow ? kBFloat16 : d->type)) return kNotSupported;
    if (o->bias_type == -1 && narrow && d->type != kBFloat16) return kNotSupported;
  }
  if (!narrow && o->fast_accumulation) return kNotSupported;
  if (!narrow) return o->scale_a || o->scale_b || o->mode_a || o->mode_b ? kNotSupported : kSuccess;
  if (!o->transpose_a || o->transpose_b) return kInvalidValue;
  if (s.m % 16 || s.k % 16 || a->leading % 16 || b->leading % 16 || d->leading * static_cast<int64_t>(size_of(d->type)) % 16)
    return kInvalidValue;
  if (o->mode_a != o->mode_b) return kNotSupported;
  return o->mode_a == kOuterVector && (!o->scale_a || !o->scale_b) ? kInvalidValue : kSuccess;
}

/// Tells apart what has algorithms of its own.
uint64_t problem_of(const Operation& o, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  uint64_t h = 14695981039346656037u;
  auto add = [&](uint64_t v) { h = (h ^ v) * 1099511628211u; };
  for (const Layout* l : {&a, &b, &c, &d}) add(static_cast<uint64_t>(l->type));
  add(static_cast<uint64_t>(o.transpose_a * 8 + o.transpose_b * 4 + o.mode_a)), add(o.epilogue), add(static_cast<uint64_t>(o.bias_type));
  return h;
}

float e4m3(uint8_t v) {
  const int exponent = v >> 3 & 15, mantissa = v & 7;
  if ((v & 0x7f) == 0x7f) return NAN;
  const float magnitude = exponent ? ldexpf(static_cast<float>(8 + mantissa), exponent - 10) : ldexpf(static_cast<float>(mantissa), -9);
  return v & 0x80 ? -magnitude : magnitude;
}

float load(const void* p, int type, size_t i) {
  if (type == kFloat32) return static_cast<const float*>(p)[i];
  return type == kBFloat16 ? uniflow::to_float(static_cast<const uniflow::bf16*>(p)[i]) : e4m3(static_cast<const uint8_t*>(p)[i]);
}

/// The vectors of length k that are multiplied, one after the other: rows of op(A), or columns of op(B).
std::vector<float> gather(const void* p, const Layout& l, bool along_columns, bool reversed) {
  const uint64_t count = along_columns ? l.columns : l.rows, k = along_columns ? l.rows : l.columns,
                 leading = static_cast<uint64_t>(l.leading);
  std::vector<float> out(count * k);
  for (uint64_t i = 0; i < count; ++i)
    for (uint64_t j = 0; j < k; ++j)
      out[i * k + (reversed ? k - 1 - j : j)] = load(p, l.type, along_columns ? i * leading + j : j * leading + i);
  return out;
}

float gelu(float x) { return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x))); }

// --- the functions ---------------------------------------------------------------------------------------------------------

template <class T, class... Args>
Status create(T** out, Args... args) {
  return *out = new T{args...}, kSuccess;
}
template <class T>
Status destroy(T* p) {
  return delete p, kSuccess;
}

struct Handle {};
Status handle_create(Handle** out) { return create(out); }
size_t get_version() { return 130002; }

Status operation_create(Operation** out, int compute, int scale_type) {
  return compute == kCompute32F && scale_type == kFloat32 ? create(out) : kNotSupported;
}
Status operation_set(Operation* o, int attribute, const void* value, size_t bytes) {
  if (!o) return kInvalidValue;
  switch (attribute) {
    case 3:
      return read(o->transpose_a, value, bytes);
    case 4:
      return read(o->transpose_b, value, bytes);
    case 7:
      return read(o->epilogue, value, bytes);
    case 8:
      return read(o->bias, value, bytes);
    case 17:
      return read(o->scale_a, value, bytes);
    case 18:
      return read(o->scale_b, value, bytes);
    case 25:
      return read(o->fast_accumulation, value, bytes);
    case 26:
      return read(o->bias_type, value, bytes);
    case 31:
      return read(o->mode_a, value, bytes);
    case 32:
      return read(o->mode_b, value, bytes);
    default:
      return kNotSupported;
  }
}

Status layout_create(Layout** out, int type, uint64_t rows, uint64_t columns, int64_t leading) {
  return type == kFloat32 || type == kBFloat16 || type == kE4M3 ? create(out, type, rows, columns, leading) : kNotSupported;
}

Status preference_create(Preference** out) { return create(out); }
Status preference_set(Preference* p, int attribute, const void* value, size_t bytes) {
  if (!p) return kInvalidValue;
  if (attribute == 1) return read(p->workspace_bytes, value, bytes);
  if (attribute == 3) return read(p->reduction_schemes, value, bytes);
  return attribute >= 5 && attribute <= 8 ? read(p->alignments[attribute - 5], value, bytes) : kNotSupported;
}

std::atomic<uint64_t> products{0};

/// Three algorithms: one needs no workspace, one, which sums backwards, some, and one fails when it is run.
Status heuristic(Handle*, Operation* o, Layout* a, Layout* b, Layout* c, Layout* d, Preference* p, int wanted, Result* results,
                 int* count) {
  Sizes s;
  *count = 0;
  if (!p || wanted < 1) return kInvalidValue;
  if (const Status status = check(o, a, b, c, d, s); status != kSuccess) return status;
  for (const Kind kind : {Kind::Forwards, Kind::Backwards, Kind::Failing}) {
    const uint64_t workspace_bytes = kind == Kind::Backwards ? 4096 : 0;
    if (workspace_bytes > p->workspace_bytes || *count == wanted) continue;
    Result& r = results[(*count)++];
    r = {{kAlgorithm, kind, workspace_bytes, problem_of(*o, *a, *b, *c, *d), {}, {}}, workspace_bytes, kSuccess, 1, {}};
    std::memcpy(r.algorithm.alignments, p->alignments, sizeof p->alignments);
  }
  return kSuccess;
}

Status matmul(Handle*, Operation* o, const float* alpha, const void* a, Layout* la, const void* b, Layout* lb, const float* beta,
              const void* c, Layout* lc, void* d, Layout* ld, const Algorithm* algorithm, void* workspace, size_t workspace_bytes,
              cudaStream_t stream) {
  Sizes s;
  if (const Status status = check(o, la, lb, lc, ld, s); status != kSuccess) return status;
  if (!alpha || !beta || !a || !b || !d || (*beta != 0 && !c)) return kInvalidValue;
  if (algorithm) {
    const void* operands[] = {a, b, c, d};
    if (algorithm->magic != kAlgorithm || algorithm->problem != problem_of(*o, *la, *lb, *lc, *ld)) return kInvalidValue;
    for (int i = 0; i < 4; ++i)
      if (reinterpret_cast<uintptr_t>(operands[i]) % algorithm->alignments[i] != 0) return kInvalidValue;
    if (workspace_bytes < algorithm->workspace_bytes) return kInvalidValue;
    if (algorithm->kind == Kind::Failing) return kExecutionFailed;
    if (algorithm->workspace_bytes > 0 && (!workspace || reinterpret_cast<uintptr_t>(workspace) % 16 != 0)) return kInvalidValue;
  }
  ++products;
  const bool reversed = algorithm && algorithm->kind == Kind::Backwards;
  const size_t scratch = algorithm ? algorithm->workspace_bytes : 0;
  // All that the caller may change or destroy afterwards is copied; what lies on the device is read when its turn comes.
  submit(stream, [=, o = *o, la = *la, lb = *lb, lc = *lc, ld = *ld, alpha = *alpha, beta = *beta] {
    if (scratch) std::memset(workspace, 0xff, scratch);
    const std::vector<float> rows = gather(a, la, o.transpose_a, reversed), columns = gather(b, lb, !o.transpose_b, reversed);
    for (uint64_t j = 0; j < s.n; ++j)
      for (uint64_t i = 0; i < s.m; ++i) {
        float sum = 0;
        for (uint64_t x = 0; x < s.k; ++x) sum += rows[i * s.k + x] * columns[j * s.k + x];
        if (o.scale_a) sum *= o.scale_a[o.mode_a == kOuterVector ? i : 0];
        if (o.scale_b) sum *= o.scale_b[o.mode_b == kOuterVector ? j : 0];
        float v = alpha * sum;
        if (beta != 0) v += beta * load(c, lc.type, i + j * static_cast<uint64_t>(lc.leading));
        if (o.epilogue & kBias) v += load(o.bias, o.bias_type != -1 ? o.bias_type : ld.type, i);
        if (o.epilogue & kGelu) v = gelu(v);
        const uint64_t at = i + j * static_cast<uint64_t>(ld.leading);
        if (ld.type == kFloat32) static_cast<float*>(d)[at] = v;
        else static_cast<uniflow::bf16*>(d)[at] = uniflow::to_bf16(v);
      }
  });
  return kSuccess;
}

}  // namespace

uint64_t cublaslt_products() { return products; }

void* cublaslt_symbol(const char* name) {
  const struct {
    const char* name;
    void* function;
  } all[] = {
      {"cublasLtCreate", reinterpret_cast<void*>(&handle_create)},
      {"cublasLtDestroy", reinterpret_cast<void*>(&destroy<Handle>)},
      {"cublasLtGetVersion", reinterpret_cast<void*>(&get_version)},
      {"cublasLtMatmulDescCreate", reinterpret_cast<void*>(&operation_create)},
      {"cublasLtMatmulDescDestroy", reinterpret_cast<void*>(&destroy<Operation>)},
      {"cublasLtMatmulDescSetAttribute", reinterpret_cast<void*>(&operation_set)},
      {"cublasLtMatrixLayoutCreate", reinterpret_cast<void*>(&layout_create)},
      {"cublasLtMatrixLayoutDestroy", reinterpret_cast<void*>(&destroy<Layout>)},
      {"cublasLtMatmulPreferenceCreate", reinterpret_cast<void*>(&preference_create)},
      {"cublasLtMatmulPreferenceDestroy", reinterpret_cast<void*>(&destroy<Preference>)},
      {"cublasLtMatmulPreferenceSetAttribute", reinterpret_cast<void*>(&preference_set)},
      {"cublasLtMatmulAlgoGetHeuristic", reinterpret_cast<void*>(&heuristic)},
      {"cublasLtMatmul", reinterpret_cast<void*>(&matmul)},
  };
  for (const auto& one : all)
    if (std::strcmp(one.name, name) == 0) return one.function;
  return nullptr;
}

}  // namespace emulator
