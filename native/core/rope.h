#pragma once

namespace uniflow {

/// Unit of rotary positions: patches, or the width of the image, from -2π at one edge to 2π at the other (DINOv3).
enum class RopeUnit { Patch, Image };

}  // namespace uniflow
