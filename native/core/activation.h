/// Activations supported by linear layers and their backward pass.
#pragma once

namespace uniflow {

enum class Activation { None, Gelu, GeluTanh, QuickGelu, Silu };

}  // namespace uniflow
