/// Products through cuBLASLt: descriptions of the operands, and a cache of the chosen algorithms.
///
/// cuBLASLt uses column-major order, in which a C-order matrix is its own transpose. So out = a b is computed as out^T = b^T a^T:
/// cuBLASLt's A is our b, its B our a, its m the columns of out and its n the rows. Roofline bound: FLOPs over the rate of the tensor
/// cores.
#include "native/cuda/gemm.h"

#include <array>
#include <compare>
#include <limits>
#include <map>
#include <mutex>

#include "native/cuda/cublaslt.h"
#include "native/cuda/runtime.h"

namespace uniflow::cuda {
namespace {

constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;  // the size that cuBLAS itself uses on Hopper
constexpr int kCandidates = 8;

lt::DataType type_of(DType dtype) {
  switch (dtype) {
    case DType::BFloat16: return lt::DataType::BFloat16;
    case DType::Float8: return lt::DataType::Float8E4M3;
    default: return lt::DataType::Float32;
  }
}

/// The largest power of two that divides an address, up to 256.
uint32_t alignment_of(const void* p) {
  const auto address = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)) | 256u;
  return address & (~address + 1);
}

// --- the description of a product for cuBLASLt -------------------------------------------------------------------------

/// A cuBLASLt handle that is destroyed at the end of the block.
template <class T>
class Owned {
 public:
  explicit Owned(lt::Status (*destroy)(T)) : destroy_(destroy) {}
  ~Owned() {
    if (value_) destroy_(value_);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  T* address() { return &value_; }
  operator T() const { return value_; }

 private:
  lt::Status (*destroy_)(T);
  T value_ = nullptr;
};

class Call {
 public:
  explicit Call(const Product& p) : p_(p) {
    describe_operation();
    if (p.b_transposed) describe(b_, p.dtype, p.inner, p.columns);
    else describe(b_, p.dtype, p.columns, p.inner);
    if (p.a_transposed) describe(a_, p.dtype, p.rows, p.inner);
    else describe(a_, p.dtype, p.inner, p.rows);
    describe(out_, p.out_dtype, p.columns, p.rows);
  }

  /// Finds algorithms for it, the most promising first; returns how many.
  int candidates(lt::Handle handle, lt::Candidate (&found)[kCandidates], int wanted) {
    if (!known_) return 0;
    Owned<lt::Preference> preference(l_.preference_destroy);
    lt::check(l_.preference_create(preference.address()), "cublasLtMatmulPreferenceCreate");
    auto set = [&](lt::PreferenceAttribute attribute, auto value) {
      lt::check(l_.preference_set(preference, attribute, &value, sizeof value), "cublasLtMatmulPreferenceSetAttribute");
    };
    set(lt::PreferenceAttribute::WorkspaceBytes, static_cast<uint64_t>(kWorkspaceBytes));
    set(lt::PreferenceAttribute::ReductionSchemes, lt::kReduceInComputeType);
    set(lt::PreferenceAttribute::AlignmentA, alignment_of(p_.b));
    set(lt::PreferenceAttribute::AlignmentB, alignment_of(p_.a));
    set(lt::PreferenceAttribute::AlignmentC, alignment_of(c()));
    set(lt::PreferenceAttribute::AlignmentD, alignment_of(p_.out));
    int count = 0;
    const lt::Status status = l_.heuristic(handle, operation_, b_, a_, out_, out_, preference, wanted, found, &count);
    if (status == lt::Status::NotSupported || status == lt::Status::InvalidValue) return 0;
    lt::check(status, "cublasLtMatmulAlgoGetHeuristic");
    int usable = 0;
    for (int i = 0; i < count; ++i)
      if (found[i].status == lt::Status::Success) found[usable++] = found[i];
    return usable;
  }

  lt::Status run(lt::Handle handle, const lt::Algorithm& algorithm, void* workspace, size_t workspace_bytes) const {
    const float alpha = 1, beta = p_.add ? 1 : 0;
    return l_.matmul(handle, operation_, &alpha, p_.b, b_, p_.a, a_, &beta, c(), out_, p_.out, out_, &algorithm, workspace, workspace_bytes,
                     stream());
  }

 private:
  const void* c() const { return p_.add ? p_.add : p_.out; }

  void describe(Owned<lt::Layout>& layout, DType dtype, int64_t rows, int64_t columns) {
    lt::check(l_.layout_create(layout.address(), type_of(dtype), static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), rows),
              "cublasLtMatrixLayoutCreate");
  }

  void describe_operation() {
    lt::check(l_.operation_create(operation_.address(), lt::Compute::Float32, lt::DataType::Float32), "cublasLtMatmulDescCreate");
    using enum lt::OperationAttribute;
    set(TransposeA, p_.b_transposed ? lt::Transpose::Yes : lt::Transpose::No);
    set(TransposeB, p_.a_transposed ? lt::Transpose::Yes : lt::Transpose::No);
    if (p_.bias || p_.gelu_tanh) set(Epilogue, (p_.bias ? lt::kEpilogueBias : 0) | (p_.gelu_tanh ? lt::kEpilogueGelu : 0));
    if (p_.bias) {
      set(BiasPointer, p_.bias);
      set(BiasType, type_of(p_.bias_dtype));
    }
    if (p_.a_scale) {
      set(ScaleModeA, lt::ScaleMode::OuterVector);
      set(ScaleModeB, lt::ScaleMode::OuterVector);
      set(ScalePointerA, p_.b_scale);
      set(ScalePointerB, p_.a_scale);
    }
  }

  template <class T>
  void set(lt::OperationAttribute attribute, T value) {
    known_ &= l_.operation_set(operation_, attribute, &value, sizeof value) == lt::Status::Success;
  }

  const lt::Library& l_ = lt::library();
  const Product& p_;
  Owned<lt::Operation> operation_{l_.operation_destroy};
  Owned<lt::Layout> a_{l_.layout_destroy}, b_{l_.layout_destroy}, out_{l_.layout_destroy};
  bool known_ = true;  // the library supports all attributes set so far
};

// --- which algorithm ---------------------------------------------------------------------------------------------------

/// Everything that the choice depends on.
struct Key {
  explicit Key(const Product& p)
      : sizes{p.rows, p.inner, p.columns},
        types{p.dtype, p.out_dtype, p.bias_dtype},
        options{p.a_transposed, p.b_transposed, p.a_scale != nullptr, p.add != nullptr, p.bias != nullptr, p.gelu_tanh},
        alignments{alignment_of(p.a), alignment_of(p.b), alignment_of(p.add), alignment_of(p.out)} {}
  std::array<int64_t, 3> sizes;
  std::array<DType, 3> types;
  std::array<bool, 6> options;
  std::array<uint32_t, 4> alignments;
  auto operator<=>(const Key&) const = default;
};

struct Choice {
  bool found = false;
  bool final = false;  // it was timed, or had no rival
  lt::Algorithm algorithm{};
  size_t workspace_bytes = 0;
};

/// State kept per device.
struct DeviceProducts {
  std::mutex mutex;  // guards the rest; one thread feeds a device, so it is never contended
  lt::Handle handle = nullptr;
  Tensor memory;  // the workspace: products run one after the other on a device's stream, also those in graphs
  std::map<Key, Choice> choices;

  void* workspace(size_t bytes) {
    if (bytes == 0) return nullptr;
    if (!memory) memory = scratch(DType::UInt8, {kWorkspaceBytes});
    return memory.data();
  }
};

DeviceProducts& device_products() {
  static auto* mutex = new std::mutex;
  static auto* all = new std::map<const Properties*, DeviceProducts>;  // never freed, like the devices
  std::lock_guard lock(*mutex);
  DeviceProducts& d = (*all)[&properties()];
  if (!d.handle) lt::check(lt::library().create(&d.handle), "cublasLtCreate");
  return d;
}

/// Milliseconds of three runs after one to warm up; infinite if the library cannot run it after all.
float time_candidate(DeviceProducts& d, const Call& call, const lt::Candidate& c) {
  auto run = [&] { return call.run(d.handle, c.algorithm, d.workspace(c.workspace_bytes), c.workspace_bytes); };
  const lt::Status status = run();
  if (status == lt::Status::NotSupported || status == lt::Status::InvalidValue) return std::numeric_limits<float>::infinity();
  lt::check(status, "cublasLtMatmul");  // not remembered as unsupported: the memory may just be full
  return milliseconds_of([&] {
    for (int i = 0; i < 3; ++i) lt::check(run(), "cublasLtMatmul");
  });
}

Choice choose(DeviceProducts& d, Call& call) {
  lt::Candidate found[kCandidates] = {};
  const bool may_wait = !recording();
  const int count = call.candidates(d.handle, found, may_wait ? kCandidates : 1);
  if (count == 0) return {.final = true};
  auto take = [](const lt::Candidate& c, bool final) { return Choice{true, final, c.algorithm, c.workspace_bytes}; };
  if (count == 1) return take(found[0], may_wait);
  constexpr float kClearly = 0.97f;  // a candidate must be clearly faster, so timer noise does not decide between equals
  int best = -1;
  float best_ms = std::numeric_limits<float>::infinity();
  for (int i = 0; i < count; ++i)
    if (const float ms = time_candidate(d, call, found[i]); ms < kClearly * best_ms) best = i, best_ms = ms;
  return best < 0 ? Choice{.final = true} : take(found[best], true);
}

const Choice& choice_for(DeviceProducts& d, const Product& p, Call& call) {
  constexpr size_t kMost = 4096;
  const Key key(p);
  if (const auto known = d.choices.find(key); known != d.choices.end() && (known->second.final || recording())) return known->second;
  if (d.choices.size() >= kMost) d.choices.clear();
  return d.choices[key] = choose(d, call);
}

struct Event {
  Event() { check(cudaEventCreate(&event), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t event = nullptr;
};

}  // namespace

bool multiply(const Product& p) {
  DeviceProducts& d = device_products();
  std::lock_guard lock(d.mutex);
  Call call(p);
  const Choice& choice = choice_for(d, p, call);
  if (!choice.found) return false;
  lt::check(call.run(d.handle, choice.algorithm, d.workspace(choice.workspace_bytes), choice.workspace_bytes), "cublasLtMatmul");
  return true;
}

float milliseconds_of(const std::function<void()>& work) {
  const Event begin, end;
  check(cudaEventRecord(begin.event, stream()), "cudaEventRecord");
  work();
  check(cudaEventRecord(end.event, stream()), "cudaEventRecord");
  check(cudaEventSynchronize(end.event), "cudaEventSynchronize");
  float ms = 0;
  check(cudaEventElapsedTime(&ms, begin.event, end.event), "cudaEventElapsedTime");
  return ms;
}

}  // namespace uniflow::cuda
