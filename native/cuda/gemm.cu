/// Products through cuBLASLt: descriptions of the operands, and a cache of the chosen algorithms.
///
/// cuBLASLt uses column-major order, in which a C-order matrix is its own transpose. So out = a b is computed as out^T = b^T a^T:
/// cuBLASLt's A is our b, its B our a, its m the columns of out and its n the rows. Roofline bound: FLOPs over the rate of the tensor
/// cores.
#include "native/cuda/gemm.h"

#include <sizes.h>

#include <algorithm>
#include <array>
#include <bit>
#include <compare>
#include <cstring>
#include <exception>
#include <limits>
#include <map>
#include <mutex>
#include <span>

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
    if (p_.dtype == DType::Float8) set(FastAccumulation, int8_t{1});
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

  /// The same for all products whose rows of data are in the same eighth of a power of two: what is fastest for one is so for the others, and a
  /// stream of batches of every size is not held up at each new one.
  Key bucket() const {
    Key k = *this;
    const bool by_terms = options[0];  // of a gradient, the rows of the data are its inner size
    int64_t& rows = k.sizes[by_terms ? 1 : 0];
    const auto step = std::max<int64_t>(1, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(rows))) / 8);
    rows = (rows + step - 1) / step * step;
    return k;
  }
};

struct Choice {
  bool found = false;
  bool final = false;  // not to be chosen again: only a guess made while a Graph was recorded is not
  lt::Algorithm algorithm{};
  size_t workspace_bytes = 0;
};

/// State kept per device.
struct DeviceProducts {
  std::mutex mutex;  // guards the rest; one thread feeds a device, so it is never contended
  lt::Handle handle = nullptr;
  Tensor memory;  // the workspace: products run one after the other on a device's stream, also those in graphs
  std::map<Key, Choice> choices;
  std::map<Key, Choice> timed;  // of a product whose rows are in the same bucket

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

/// Milliseconds of three runs after one to warm up; infinite if the library refuses it after all. Throws Error if it fails otherwise.
float time_candidate(DeviceProducts& d, const Call& call, const lt::Candidate& c) {
  auto run = [&] { return call.run(d.handle, c.algorithm, d.workspace(c.workspace_bytes), c.workspace_bytes); };
  const lt::Status status = run();
  if (status == lt::Status::NotSupported || status == lt::Status::InvalidValue) return std::numeric_limits<float>::infinity();
  lt::check(status, "cublasLtMatmul");
  return milliseconds_of([&] {
    for (int i = 0; i < 3; ++i) lt::check(run(), "cublasLtMatmul");
  });
}

Choice take(const lt::Candidate& c, bool final) { return {true, final, c.algorithm, c.workspace_bytes}; }

/// The fastest candidate that runs. One that fails is left out: the library's heuristic is no promise. Not found if all are refused.
/// Throws the last other failure if none runs, and at once if the memory is full, because that says nothing about the candidates.
Choice fastest(DeviceProducts& d, const Call& call, std::span<const lt::Candidate> candidates) {
  constexpr float kClearly = 0.97f;  // a candidate must be clearly faster, so timer noise does not decide between equals
  Choice best{.final = true};
  float best_ms = std::numeric_limits<float>::infinity();
  std::exception_ptr failure;
  for (const lt::Candidate& c : candidates) {
    try {
      if (const float ms = time_candidate(d, call, c); ms < kClearly * best_ms) best = take(c, true), best_ms = ms;
    } catch (const Error& e) {
      if (e.code == ErrorCode::OutOfMemory) throw;
      failure = std::current_exception();
      cudaGetLastError();  // clear it, or the next call would report it again
    }
  }
  if (!best.found && failure) std::rethrow_exception(failure);
  return best;
}

/// The candidate whose algorithm was the fastest for a similar product, otherwise the library's first guess.
Choice similar(const Choice& timed, std::span<const lt::Candidate> candidates) {
  for (const lt::Candidate& c : candidates)
    if (std::memcmp(&c.algorithm, &timed.algorithm, sizeof c.algorithm) == 0) return take(c, true);
  return take(candidates.front(), true);
}

Choice choose(DeviceProducts& d, const Product& p, const Key& key, Call& call) {
  lt::Candidate found[kCandidates] = {};
  const int count = call.candidates(d.handle, found, kCandidates);
  if (count == 0) return {.final = true};
  const std::span<const lt::Candidate> candidates(found, static_cast<size_t>(count));
  if (const auto timed = d.timed.find(key.bucket()); timed != d.timed.end() && timed->second.found) return similar(timed->second, candidates);
  const bool repeatable = p.add != p.out;  // timing runs a product several times
  if (recording() || !repeatable) return take(found[0], !repeatable);
  return d.timed[key.bucket()] = fastest(d, call, candidates);
}

const Choice& choice_for(DeviceProducts& d, const Product& p, Call& call) {
  constexpr size_t kMost = 4096;
  const Key key(p);
  if (const auto known = d.choices.find(key); known != d.choices.end() && (known->second.final || recording())) return known->second;
  if (d.choices.size() >= kMost) d.choices.clear();  // the timed ones stay
  return d.choices[key] = choose(d, p, key, call);
}

struct Event {
  Event() { check(cudaEventCreate(&event), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t event = nullptr;
};

/// Whether the library did it.
bool multiply_at_once(const Product& p) {
  DeviceProducts& d = device_products();
  std::lock_guard lock(d.mutex);
  Call call(p);
  const Choice& choice = choice_for(d, p, call);
  if (!choice.found) return false;
  lt::check(call.run(d.handle, choice.algorithm, d.workspace(choice.workspace_bytes), choice.workspace_bytes), "cublasLtMatmul");
  return true;
}

/// `rows` rows of `width` values further on.
template <class P>
P moved(P p, int64_t rows, int64_t width, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<P>>, const std::byte, std::byte>;
  return p ? static_cast<Byte*>(p) + rows * width * size_of(dtype) : nullptr;
}

/// Rows [first, first + count) of the result.
Product rows_of(const Product& p, int64_t first, int64_t count) {
  Product part = p;
  part.rows = count;
  part.a = moved(p.a, first, p.inner, p.dtype);
  part.out = moved(p.out, first, p.columns, p.out_dtype);
  part.add = moved(p.add, first, p.columns, p.out_dtype);
  if (p.a_scale) part.a_scale = p.a_scale + first;
  return part;
}

/// Terms [first, first + count) of the sums, of transposed a and untransposed b, added to the terms before.
Product terms_of(const Product& p, int64_t first, int64_t count) {
  Product part = p;
  part.inner = count;
  part.a = moved(p.a, first, p.rows, p.dtype);
  part.b = moved(p.b, first, p.columns, p.dtype);
  if (first > 0) part.add = p.out;
  return part;
}

}  // namespace

bool multiply(const Product& p) {
  const bool by_terms = p.a_transposed;  // the gradient of a weight sums over all rows of the data
  const int64_t length = by_terms ? p.inner : p.rows, width = std::max(by_terms ? p.rows : p.inner, p.columns);
  const int64_t most = std::max<int64_t>(kMostElements / width / 128 * 128, 128);
  for (int64_t first = 0; first < length; first += most) {
    const int64_t count = std::min(most, length - first);
    if (!multiply_at_once(by_terms ? terms_of(p, first, count) : rows_of(p, first, count))) return false;
  }
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
