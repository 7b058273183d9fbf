/// Reading one `.safetensors` file: an 8-byte header length, a JSON header, and the tensors' bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace uniflow {

/// Every element type that the format knows. Wider than what the library computes with, so that a file
/// may hold a tensor that nobody asks for; whoever asks for one decides which types it takes.
enum class FileDType : uint8_t {
  BOOL, F4, F6_E2M3, F6_E3M2, U8, I8, F8_E5M2, F8_E4M3, F8_E8M0, F8_E4M3FNUZ, F8_E5M2FNUZ,
  I16, U16, F16, BF16, I32, U32, F32, C64, F64, I64, U64,
};

/// The name in the file's header, such as "BF16".
const char* name_of(FileDType dtype);

/// Bits, not bytes, of one element: the format packs its smallest floats.
unsigned bits_of(FileDType dtype);

/// A memory-mapped, fully validated `.safetensors` file.
///
/// Everything that the header claims is checked when the file is opened, at least as strictly as the
/// format's reference implementation does, so the rest of the library can trust an Entry blindly. Where
/// the reference is lenient about what a writer never produces (a name given twice, unknown fields,
/// space before the header's `{`), this reader refuses: such a file means different things to different
/// readers.
///
/// The mapping shows the file as it is on disk, not a snapshot. If another process shortens the file
/// while it is mapped, touching the lost pages raises SIGBUS, which no reader of a mapping can prevent;
/// replace checkpoints by renaming a new file over the old one, never by rewriting them in place.
class SafetensorsFile {
 public:
  /// One tensor. `data` points into the mapping and lives as long as the file object does. It has no
  /// alignment whatever: the header's length shifts everything behind it, so copy, don't cast.
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

  /// Maps and validates the file. Throws Error(BadCheckpoint) that names the file, the tensor, what was
  /// expected and what came; the first problem found is the one reported.
  static std::shared_ptr<SafetensorsFile> open(const std::string& path);

  /// Validates a file's bytes in memory; `name` stands for the file in messages. The entries point into
  /// `bytes`.
  static Contents parse(const std::byte* bytes, size_t size, const std::string& name);

  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::map<std::string, Entry>& entries() const { return contents_.entries; }
  const std::map<std::string, std::string>& metadata() const { return contents_.metadata; }
  const std::string& path() const { return path_; }

  /// Tells the kernel that this tensor's pages are not needed any more, so that loading a checkpoint
  /// does not hold the mapped and the converted copy at once. Only pages that lie wholly inside the
  /// tensor go. Reading it again is allowed, and reads the file again.
  void release(const Entry& entry) const;

 private:
  SafetensorsFile(std::string path, const std::byte* mapping, size_t size);

  std::string path_;
  const std::byte* mapping_;
  size_t size_;
  Contents contents_;
};

}  // namespace uniflow
