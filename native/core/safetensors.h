/// Reading one `.safetensors` file: an 8-byte header length, a JSON header, and the tensors' bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace uniflow {

/// Every element type of the format. There are more of them than the library computes with, so a file may contain tensors of other types as
/// long as they are not loaded.
enum class FileDType : uint8_t {
  BOOL, F4, F6_E2M3, F6_E3M2, U8, I8, F8_E5M2, F8_E4M3, F8_E8M0, F8_E4M3FNUZ, F8_E5M2FNUZ,
  I16, U16, F16, BF16, I32, U32, F32, C64, F64, I64, U64,
};

/// The name in the file's header, such as "BF16".
const char* name_of(FileDType dtype);

/// Size of one element in bits: the format packs its smallest floats.
unsigned bits_of(FileDType dtype);

/// A memory-mapped, fully validated `.safetensors` file.
///
/// Opening a file checks everything that its header claims, at least as strictly as the format's reference implementation, so the rest of
/// the library can trust an Entry. This reader also refuses what the reference tolerates but no writer produces (a repeated name, unknown
/// fields, space before the header's `{`), because different readers interpret such files differently.
///
/// The mapping shows the file on disk, not a snapshot. If another process truncates the file while it is mapped, reading the lost pages
/// raises SIGBUS, and no reader of a mapping can prevent that. Replace checkpoints by renaming a new file over the old one; never rewrite
/// them in place.
class SafetensorsFile {
 public:
  /// One tensor. `data` points into the mapping and is valid as long as the file object. It has no alignment, because the header's length
  /// shifts the data: copy, don't cast.
  struct Entry {
    FileDType dtype;
    std::vector<int64_t> shape;
    const std::byte* data;
    size_t bytes;
  };

  struct Contents {
    std::map<std::string, Entry> entries;
    std::map<std::string, std::string> metadata;
  };

  /// Maps and validates the file. Throws Error(BadCheckpoint) for the first problem, with the file, the tensor, and the expected and actual
  /// values.
  static std::shared_ptr<SafetensorsFile> open(const std::string& path);

  /// Validates a file's bytes in memory; messages use `name` for the file. The entries point into `bytes`.
  static Contents parse(const std::byte* bytes, size_t size, const std::string& name);

  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::map<std::string, Entry>& entries() const { return contents_.entries; }
  const std::map<std::string, std::string>& metadata() const { return contents_.metadata; }
  const std::string& path() const { return path_; }

  /// Tells the kernel that this tensor's pages are no longer needed, so loading a checkpoint does not hold both the mapped and the
  /// converted copy. Only pages wholly inside the tensor are dropped. Reading it again is allowed and reads the file again.
  void release(const Entry& entry) const;

 private:
  SafetensorsFile(std::string path, const std::byte* mapping, size_t size);

  std::string path_;
  const std::byte* mapping_;
  size_t size_;
  Contents contents_;
};

}  // namespace uniflow
