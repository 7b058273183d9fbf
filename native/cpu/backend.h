/// The CPU as a device.
#pragma once

#include <memory>

#include "native/core/backend.h"

namespace uniflow::cpu {

std::unique_ptr<Backend> make_backend();

}  // namespace uniflow::cpu
