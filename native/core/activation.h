/// The activations that linear layers and their backward pass know.
#pragma once

namespace uniflow {

enum class Activation { None, Gelu, GeluTanh, QuickGelu, Silu };

}  // namespace uniflow
