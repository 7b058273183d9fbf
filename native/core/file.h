/// Reading files, where somebody else will say what is wrong with those that cannot be read; and locking them.
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

/// The whole of a regular file that begins with `start`. Null: there is none, it begins otherwise, it has more than `most` bytes, or it cannot be
/// read.
std::optional<Bytes> read_file(const std::string& path, std::span<const uint8_t> start, size_t most);

/// Takes the lock of an open file, which goes when the file is closed: also with a process that is killed. Where a file system has no locks, everybody
/// gets it.
/// @returns false where another opening of the file has it.
bool lock_file(int fd);

}  // namespace uniflow
