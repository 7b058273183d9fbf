#include "native/cpu/backend.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "native/core/tensor.h"
#include "native/cpu/kernels.h"

namespace uniflow::cpu {
namespace {

constexpr int64_t kMapFrom = 256 << 10;  // blocks from this size on are mapped, so freeing returns them at once
constexpr int64_t kHugeFrom = 4 << 20;   // blocks from this size on request huge pages: fewer TLB misses in GEMMs

class HostMemory : public Memory {
 public:
  void* allocate(int64_t bytes) override {
    if (bytes < kMapFrom) return std::aligned_alloc(64, static_cast<size_t>(bytes));
    void* p = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
    if (bytes >= kHugeFrom) madvise(p, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
    return p;
  }
  void release(void* p, int64_t bytes) noexcept override {
    if (bytes < kMapFrom) std::free(p);
    else munmap(p, static_cast<size_t>(bytes));
  }
  std::string name() const override { return "host memory"; }
  /// A quarter of the machine, enough for the activations of a training step.
  int64_t pool_limit() const override {
    static const int64_t limit = std::max<int64_t>(int64_t{1} << 30, sysconf(_SC_PHYS_PAGES) / 4 * sysconf(_SC_PAGESIZE));
    return limit;
  }
};

/// On the CPU, all work has ended when the call returns.
class CpuBackend : public Backend {
 public:
  const Kernels& kernels() const override { return cpu::kernels(); }
  std::string description() const override { return std::string(cpu::kernels().name) + " kernels"; }
  Memory& memory() override { return memory_; }
  Memory* staging() override { return nullptr; }
  void enter(Device&) override {}
  void upload(const Tensor& to, const Tensor& staged) override { std::memcpy(to.data(), staged.data(), static_cast<size_t>(to.bytes())); }
  void download(void* to, DType dtype, const Tensor& from) override {
    if (from.packing()) cpu::kernels().unpack(*from.packing(), from.data(), to, dtype);
    else if (from.dtype() != dtype) cpu::kernels().cast(from.data(), from.dtype(), to, dtype, from.size());
    else if (from.bytes()) std::memcpy(to, from.data(), static_cast<size_t>(from.bytes()));
  }
  void after(std::function<void(std::shared_ptr<const Error>)> then) override { then(nullptr); }
  void settle() override {}

 private:
  HostMemory memory_;
};

}  // namespace

std::unique_ptr<Backend> make_backend() { return std::make_unique<CpuBackend>(); }

}  // namespace uniflow::cpu
