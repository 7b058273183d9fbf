/// Reads files without reporting errors (the caller's fallback reports them), and locks files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

namespace uniflow {

struct Bytes {
  std::unique_ptr<uint8_t[]> data;
  size_t size;

  std::span<const uint8_t> span() const { return {data.get(), size}; }
};

/// The whole content of a regular file that begins with `start`. Null if the file is missing or unreadable, begins otherwise, or has more
/// than `most` bytes.
std::optional<Bytes> read_file(const std::string& path, std::span<const uint8_t> start, size_t most);

/// Locks an open file. The lock ends when the file is closed, also if the process is killed. On a file system without locks every caller
/// succeeds.
/// @returns false if another open file description holds the lock.
bool lock_file(int fd);

}  // namespace uniflow
