#include "native/core/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>
#include <system_error>
#include <utility>

#include "native/core/error.h"
#include "native/core/json.h"

namespace uniflow {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian and is read as it lies");
static_assert(sizeof(size_t) == 8, "checkpoints are larger than a 32-bit address space");

constexpr size_t kLengthBytes = 8;
constexpr char kMetadataKey[] = "__metadata__";
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the reference implementation's limit

struct DTypeInfo {
  FileDType dtype;
  const char* name;
  unsigned bits;
};

constexpr DTypeInfo kDTypes[] = {
    {FileDType::BOOL, "BOOL", 8}, {FileDType::F4, "F4", 4},
    {FileDType::F6_E2M3, "F6_E2M3", 6}, {FileDType::F6_E3M2, "F6_E3M2", 6},
    {FileDType::U8, "U8", 8}, {FileDType::I8, "I8", 8},
    {FileDType::F8_E5M2, "F8_E5M2", 8}, {FileDType::F8_E4M3, "F8_E4M3", 8},
    {FileDType::F8_E8M0, "F8_E8M0", 8}, {FileDType::F8_E4M3FNUZ, "F8_E4M3FNUZ", 8},
    {FileDType::F8_E5M2FNUZ, "F8_E5M2FNUZ", 8}, {FileDType::I16, "I16", 16},
    {FileDType::U16, "U16", 16}, {FileDType::F16, "F16", 16},
    {FileDType::BF16, "BF16", 16}, {FileDType::I32, "I32", 32},
    {FileDType::U32, "U32", 32}, {FileDType::F32, "F32", 32},
    {FileDType::C64, "C64", 64}, {FileDType::F64, "F64", 64},
    {FileDType::I64, "I64", 64}, {FileDType::U64, "U64", 64},
};

constexpr bool table_follows_enum() {
  for (size_t i = 0; i < std::size(kDTypes); ++i)
    if (static_cast<size_t>(kDTypes[i].dtype) != i) return false;
  return true;
}
static_assert(table_follows_enum(), "kDTypes is indexed by FileDType");

/// Text from the file, made safe for a message: printable ASCII only, because the file may contain anything, and shortened, because it may
/// be as long as the header.
std::string printable(std::string_view text) {
  constexpr size_t kLimit = 240;
  constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  for (const char c : text.substr(0, kLimit)) {
    const auto u = static_cast<unsigned char>(c);
    if (u >= 0x20 && u < 0x7f) {
      out += c;
    } else {
      out += {'\\', 'x', kHex[u >> 4], kHex[u & 15]};
    }
  }
  return text.size() > kLimit ? out + "..." : out;
}

std::string in_quotes(std::string_view text) { return '"' + printable(text) + '"'; }

/// A shape or a range, as written in the header.
std::string in_brackets(std::span<const int64_t> numbers) {
  std::string out;
  for (const int64_t number : numbers) {
    if (!out.empty()) out += ", ";
    out += std::to_string(number);
  }
  return '[' + printable(out) + ']';
}

[[noreturn]] void refuse(std::string subject, std::string expected, std::string actual) {
  throw Error(ErrorCode::BadCheckpoint, std::move(subject), std::move(expected), std::move(actual));
}

/// Receives the header's JSON events. At each point exactly one kind of value is valid.
///
/// Event-based parsing makes strictness cheap: it detects a repeated name, the nesting cannot exceed the format's depth, and no second copy
/// of the header is built. Every callback either accepts its value or throws.
class HeaderReader final : public JsonEvents {
 public:
  HeaderReader(const std::string& file, const std::byte* data, size_t data_bytes)
      : file_(file), data_(data), data_bytes_(data_bytes) {}

  void literal(std::string_view text) override { reject(std::string(text)); }

  void number(std::string_view text) override {
    int64_t value = 0;
    const char* const last = text.data() + text.size();
    const auto [end, error] = std::from_chars(text.data(), last, value);
    if (where_ != Where::Array || error != std::errc() || end != last || text.starts_with('-'))
      reject("the number " + printable(text));
    numbers_.push_back(value);
  }

  void string(std::string value) override {
    if (where_ == Where::Metadata) {
      contents_.metadata[key_] = std::move(value);
    } else if (where_ == Where::Tensor && field_ == "dtype") {
      dtype_ = dtype_named(value);
    } else {
      reject("the string " + in_quotes(value));
    }
  }

  void begin_object() override {
    switch (where_) {
      case Where::Start: where_ = Where::Root; break;
      case Where::Root:
        where_ = key_ == kMetadataKey ? Where::Metadata : Where::Tensor;
        metadata_seen_ = metadata_seen_ || where_ == Where::Metadata;
        break;
      default: reject("an object");
    }
  }

  void key(std::string name) override {
    if (where_ != Where::Tensor) {
      if (is_repeated(name)) refuse(file_ + ", header", "every name once", in_quotes(name) + " twice");
      key_ = std::move(name);
      return;
    }
    if (is_repeated(name)) fail("every field once", in_quotes(name) + " twice");
    if (name != "dtype" && name != "shape" && name != "data_offsets")
      fail("only dtype, shape and data_offsets", "the field " + in_quotes(name));
    field_ = std::move(name);
  }

  void end_object() override {
    if (where_ == Where::Tensor) add_tensor();
    where_ = Where::Root;
  }

  void begin_array() override {
    if (where_ != Where::Tensor || field_ == "dtype") reject("an array");
    where_ = Where::Array;
    numbers_.clear();
  }

  void end_array() override {
    if (field_ == "shape") {
      shape_ = std::move(numbers_);
    } else {
      if (numbers_.size() != 2) fail("two offsets", std::to_string(numbers_.size()), field_);
      offsets_ = {numbers_[0], numbers_[1]};
    }
    where_ = Where::Tensor;
  }

  SafetensorsFile::Contents take() { return std::move(contents_); }

 private:
  enum class Where { Start, Root, Metadata, Tensor, Array };

  /// Refuses the file. The subject names the place in the header, down to the tensor.
  [[noreturn]] void fail(const std::string& expected, const std::string& actual,
                         const std::string& part = "") const {
    const bool in_metadata = where_ == Where::Metadata || key_ == kMetadataKey;
    std::string subject = file_ + (in_metadata ? ", __metadata__" : ", tensor " + in_quotes(key_));
    if (where_ == Where::Metadata) subject += ", key " + in_quotes(key_);
    if (!part.empty()) subject += ", " + part;
    refuse(subject, expected, actual);
  }

  /// A value that is not allowed at this place.
  [[noreturn]] void reject(const std::string& actual) const {
    if (where_ == Where::Metadata) fail("a string", actual);
    if (where_ == Where::Root)
      fail(key_ == kMetadataKey ? "an object of strings" : "an object of dtype, shape and data_offsets", actual);
    if (where_ == Where::Array) fail("non-negative integers below 2^63", actual, field_);
    fail(field_ == "dtype" ? "a string" : "an array of integers", actual, field_);
  }

  bool is_repeated(const std::string& name) const {
    switch (where_) {
      case Where::Metadata: return contents_.metadata.contains(name);
      case Where::Tensor:
        return (name == "dtype" && dtype_) || (name == "shape" && shape_) || (name == "data_offsets" && offsets_);
      default: return contents_.entries.contains(name) || (name == kMetadataKey && metadata_seen_);
    }
  }

  FileDType dtype_named(const std::string& name) const {
    for (const DTypeInfo& info : kDTypes)
      if (info.name == name) return info.dtype;
    fail("an element type of the safetensors format", in_quotes(name), "dtype");
  }

  /// The tensor's object is complete: its fields must agree with each other and with the file's size.
  void add_tensor() {
    if (!dtype_ || !shape_ || !offsets_)
      fail("the fields dtype, shape and data_offsets",
           std::string("no ") + (!dtype_ ? "dtype" : !shape_ ? "shape" : "data_offsets"));
    const auto [begin, end] = *offsets_;
    if (begin > end || static_cast<size_t>(end) > data_bytes_)
      fail("begin <= end <= " + std::to_string(data_bytes_) + ", the bytes of data", in_brackets(*offsets_),
           "data_offsets");
    const size_t claimed = static_cast<size_t>(end - begin);
    const uint64_t bytes = bytes_of(*dtype_, *shape_);
    if (bytes != claimed)
      fail(std::to_string(bytes) + " bytes for shape " + in_brackets(*shape_) + " of " + name_of(*dtype_),
           std::to_string(claimed) + " in " + in_brackets(*offsets_), "data_offsets");

    contents_.entries.emplace(key_, SafetensorsFile::Entry{*dtype_, *std::move(shape_), data_ + begin, bytes});
    dtype_.reset();
    shape_.reset();
    offsets_.reset();
  }

  /// The overflow check skips zero dimensions. So its result does not depend on the order of the dimensions, and strides computed from the
  /// shape cannot overflow either.
  uint64_t bytes_of(FileDType dtype, const std::vector<int64_t>& shape) const {
    uint64_t bits = bits_of(dtype);
    bool empty = false;
    for (const int64_t dim : shape) {
      empty = empty || dim == 0;
      if (dim != 0 && __builtin_mul_overflow(bits, static_cast<uint64_t>(dim), &bits))
        fail("a size below 2^64 bits", in_brackets(shape), "shape");
    }
    if (empty) return 0;
    if (bits % 8 != 0) fail("whole bytes", in_brackets(shape) + " of " + name_of(dtype), "shape");
    return bits / 8;
  }

  const std::string& file_;
  const std::byte* data_;
  size_t data_bytes_;
  SafetensorsFile::Contents contents_;

  Where where_ = Where::Start;
  bool metadata_seen_ = false;
  std::string key_;    // in the root object, or in __metadata__ when inside it
  std::string field_;  // in the tensor's object
  std::vector<int64_t> numbers_;
  std::optional<FileDType> dtype_;
  std::optional<std::vector<int64_t>> shape_;
  std::optional<std::array<int64_t, 2>> offsets_;
};

/// The header as text. Its length is checked before any of it is read.
std::string_view header_of(const std::byte* bytes, size_t size, const std::string& name) {
  if (size < kLengthBytes) refuse(name, "a file of at least 8 bytes", std::to_string(size) + " bytes");
  uint64_t length = 0;
  std::memcpy(&length, bytes, kLengthBytes);
  const uint64_t limit = std::min(kMaxHeaderBytes, size - kLengthBytes);
  if (length > limit)
    refuse(name + ", header length",
           "at most " + std::to_string(limit) + " in a file of " + std::to_string(size) + " bytes",
           std::to_string(length));
  const std::string_view header(reinterpret_cast<const char*>(bytes) + kLengthBytes, length);
  if (!header.starts_with('{'))
    refuse(name + ", header", "text that begins with {", in_quotes(header.substr(0, 16)));
  return header;
}

/// Tensors must tile the data. An overlap or a hole means that an offset is wrong, and bytes outside of all tensors could hide anything.
void check_tiling(const SafetensorsFile::Contents& contents, const std::byte* data, size_t data_bytes,
                  const std::string& name) {
  std::vector<std::pair<const std::string*, const SafetensorsFile::Entry*>> order;
  for (const auto& [key, entry] : contents.entries) order.emplace_back(&key, &entry);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->data, a.second->bytes) < std::pair(b.second->data, b.second->bytes);
  });
  size_t covered = 0;
  for (const auto& [key, entry] : order) {
    const auto begin = static_cast<size_t>(entry->data - data);
    if (begin != covered)
      refuse(name + ", tensor " + in_quotes(*key) + ", data_offsets",
             "a begin of " + std::to_string(covered) + ", where the tensor before it ends",
             std::to_string(begin) + (begin < covered ? " (an overlap)" : " (a hole)"));
    covered += entry->bytes;
  }
  if (covered != data_bytes)
    refuse(name, std::to_string(covered) + " bytes of data, where the last tensor ends",
           std::to_string(data_bytes));
}

[[noreturn]] void throw_system(const std::string& path, int error) {
  throw Error(error == ENOMEM ? ErrorCode::OutOfMemory : ErrorCode::BadCheckpoint, path, "a readable file",
              std::generic_category().message(error));
}

/// Closes the descriptor on every path; a mapping stays valid without it.
struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

/// Size of the open file, which must be a regular file.
size_t size_of_regular_file(const Descriptor& file, const std::string& path) {
  struct stat status {};
  if (::fstat(file.fd, &status) != 0) throw_system(path, errno);
  if (!S_ISREG(status.st_mode))
    refuse(path, "a regular file", S_ISDIR(status.st_mode) ? "a folder" : "a device or pipe");
  return static_cast<size_t>(status.st_size);
}

}  // namespace

const char* name_of(FileDType dtype) { return kDTypes[static_cast<size_t>(dtype)].name; }

unsigned bits_of(FileDType dtype) { return kDTypes[static_cast<size_t>(dtype)].bits; }

SafetensorsFile::Contents SafetensorsFile::parse(const std::byte* bytes, size_t size, const std::string& name) {
  const std::string_view header = header_of(bytes, size, name);
  const std::byte* data = bytes + kLengthBytes + header.size();
  const size_t data_bytes = size - kLengthBytes - header.size();

  HeaderReader reader(name, data, data_bytes);
  try {
    read_json(header, reader);
  } catch (const JsonError& error) {
    refuse(name + ", header", "valid JSON in UTF-8", printable(error.what()));
  }
  Contents contents = reader.take();
  check_tiling(contents, data, data_bytes, name);
  return contents;
}

std::shared_ptr<SafetensorsFile> SafetensorsFile::open(const std::string& path) {
  if (path.find('\0') != std::string::npos)
    refuse(printable(path), "a path without zero bytes", "one with a zero byte");
  // O_NONBLOCK: opening a pipe must fail at the check below, not block until something writes to it.
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) throw_system(path, errno);
  const size_t size = size_of_regular_file(file, path);
  if (size == 0) parse(nullptr, 0, path);  // cannot be mapped; parse() throws the right error

  void* mapping = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (mapping == MAP_FAILED) throw_system(path, errno);
  std::shared_ptr<SafetensorsFile> opened(new SafetensorsFile(path, static_cast<const std::byte*>(mapping), size));
  opened->contents_ = parse(opened->mapping_, size, path);
  return opened;
}

SafetensorsFile::SafetensorsFile(std::string path, const std::byte* mapping, size_t size)
    : path_(std::move(path)), mapping_(mapping), size_(size) {}

SafetensorsFile::~SafetensorsFile() { ::munmap(const_cast<std::byte*>(mapping_), size_); }

void SafetensorsFile::release(const Entry& entry) const {
  const auto base = reinterpret_cast<uintptr_t>(mapping_);
  const auto begin = reinterpret_cast<uintptr_t>(entry.data);
  const uintptr_t end = begin + entry.bytes;
  // Dropping pages outside of the mapping would corrupt other memory.
  if (begin < base || end < begin || end > base + size_)
    throw Error(ErrorCode::Internal, path_ + ": release() was given a tensor of another file");

  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = end / page * page;
  // Only a hint: if the kernel ignores it, the pages stay until the file is closed.
  if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

}  // namespace uniflow
