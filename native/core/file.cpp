#include "native/core/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

namespace uniflow {
namespace {

/// Closes the file when destroyed.
class Descriptor {
 public:
  explicit Descriptor(const std::string& path) : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  /// Size of a regular file; 0 for anything else.
  size_t size() const {
    struct stat info;
    return fd_ >= 0 && fstat(fd_, &info) == 0 && S_ISREG(info.st_mode) ? static_cast<size_t>(info.st_size) : 0;
  }

  bool read_all(std::span<uint8_t> to) const {
    while (!to.empty()) {
      const ssize_t n = read(fd_, to.data(), to.size());
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return false;
      to = to.subspan(static_cast<size_t>(n));
    }
    return true;
  }

 private:
  int fd_;
};

/// Checked before opening: opening a pipe would make its writer believe that it has a reader.
bool is_regular(const std::string& path) {
  struct stat info;
  return path.find('\0') == std::string::npos && stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode);
}

}  // namespace

std::optional<Bytes> read_file(const std::string& path, std::span<const uint8_t> start, size_t most) {
  if (!is_regular(path)) return std::nullopt;
  const Descriptor file(path);
  const size_t size = file.size();
  if (size < start.size() || size > most) return std::nullopt;
  std::vector<uint8_t> found(start.size());
  if (!file.read_all(found) || !std::ranges::equal(found, start)) return std::nullopt;
  Bytes bytes{std::make_unique_for_overwrite<uint8_t[]>(size), size};
  std::ranges::copy(start, bytes.data.get());
  if (!file.read_all({bytes.data.get() + start.size(), size - start.size()})) return std::nullopt;
  return bytes;
}

bool lock_file(int fd) { return flock(fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK; }

}  // namespace uniflow
