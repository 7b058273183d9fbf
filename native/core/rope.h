#pragma once

namespace uniflow {

/// What rotary positions count: patches, or the width of the image, from -2π at one edge to 2π at the other (DINOv3).
enum class RopeUnit { Patch, Image };

}  // namespace uniflow
