#include "native/core/device.h"

#include <cstdlib>
#include <mutex>

#include "native/core/team.h"
#include "native/cpu/backend.h"
#include "native/cuda/loader.h"

namespace uniflow {
namespace {

std::mutex& registry_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

std::vector<std::pair<std::string, Device*>>& registry() {
  static auto* devices = new std::vector<std::pair<std::string, Device*>>;
  return *devices;
}

void halt_all() {
  for (auto& [name, device] : registry()) device->stream().halt();
}

}  // namespace

Device::Device(std::string name, std::unique_ptr<Backend> backend)
    : name_(std::move(name)),
      backend_(std::move(backend)),
      memory_(backend_->memory()),
      staging_(backend_->staging() ? std::make_unique<Allocator>(*backend_->staging()) : nullptr),
      stream_(std::make_unique<Stream>(*this, default_threads())) {}

Device& Device::cpu() {
  // Never destroyed: tensors may outlive static destructors, and the stream's thread may still be waiting when they run. Shutdown closes
  // sessions in order; without sessions the thread sleeps and touches nothing.
  static Device* device = new Device("cpu", cpu::make_backend());
  return *device;
}

Device& Device::get(const std::string& name) {
  if (name == "cpu") return cpu();
  const std::string full = name == "cuda" ? "cuda:0" : name;
  std::lock_guard lock(registry_mutex());
  for (auto& [known, device] : registry())
    if (known == full) return *device;
  auto* device = new Device(full, cuda::open_device(full));
  // The CUDA runtime shuts down at process exit, and no work may be submitted after that. This handler is registered after CUDA's, so it
  // runs before it.
  if (registry().empty()) std::atexit(halt_all);
  registry().emplace_back(full, device);
  return *device;
}

std::vector<Device*> Device::opened() {
  std::vector<Device*> devices{&cpu()};
  std::lock_guard lock(registry_mutex());
  for (auto& [name, device] : registry()) devices.push_back(device);
  return devices;
}

std::vector<Device::Status> Device::all() {
  std::vector<Status> devices{{"cpu", true, cpu().backend().description()}};
  for (Status& s : cuda::list_devices()) devices.push_back(std::move(s));
  return devices;
}

Tensor::Tensor(DType dtype, Shape shape, Placement placement) : Tensor(Device::cpu(), dtype, std::move(shape), placement) {}

}  // namespace uniflow
