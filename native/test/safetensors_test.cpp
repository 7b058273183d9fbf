/// Tests of the checkpoint reader: good files of every kind, one corruption per rule of the format, and
/// random mutations that must be read or refused, never crash.
///
///   safetensors_test [mutations = 20000] [seed = 1]
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "native/core/error.h"
#include "native/core/safetensors.h"

namespace {

using uniflow::Error;
using uniflow::ErrorCode;
using uniflow::SafetensorsFile;
namespace fs = std::filesystem;

int passed = 0, failed = 0;

/// Runs one case; `body` returns what is wrong, or nothing.
void check(const std::string& name, const std::function<std::string()>& body) {
  std::string problem;
  try {
    problem = body();
  } catch (const std::exception& error) {
    problem = std::string("unexpected exception: ") + error.what();
  }
  ++(problem.empty() ? passed : failed);
  std::printf("%s  %s  %s\n", problem.empty() ? "ok  " : "FAIL", name.c_str(), problem.c_str());
}

/// The folder that all files of this run are written to; gone when the program ends.
struct TempFolder {
  fs::path path;
  TempFolder() {
    std::string pattern = (fs::temp_directory_path() / "safetensors_test_XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("can't make a temporary folder");
    path = pattern;
  }
  ~TempFolder() { fs::remove_all(path); }
};

/// A new file each time, since rewriting one is what the reader's users must not do either.
std::string write(const TempFolder& folder, const std::string& bytes) {
  const std::string path = (folder.path / "a.safetensors").string();
  fs::remove(path);
  std::ofstream(path, std::ios::binary) << bytes;
  return path;
}

std::string length_field(uint64_t length) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes;
}

uint64_t length_in(const std::string& bytes) {
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  return length;
}

/// `count` bytes of data that differ from their neighbours.
std::string data_of(size_t count) {
  std::string bytes(count, '\0');
  for (size_t i = 0; i < count; ++i) bytes[i] = static_cast<char>(i * 7 + 1);
  return bytes;
}

std::string file_of(const std::string& header, size_t data_bytes) {
  return length_field(header.size()) + header + data_of(data_bytes);
}

std::string tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

/// A file of one tensor named w.
std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets, size_t data_bytes) {
  return file_of(R"({"w":)" + tensor(dtype, shape, offsets) + "}", data_bytes);
}

/// Touches every byte of every tensor.
unsigned sum_of(const std::map<std::string, SafetensorsFile::Entry>& entries) {
  unsigned sum = 0;
  for (const auto& [name, entry] : entries)
    for (size_t i = 0; i < entry.bytes; ++i) sum = sum * 31 + static_cast<unsigned>(entry.data[i]);
  return sum;
}

/// The result of reading, for comparison: the sum of all data, or the refusal.
std::string outcome_of(const std::function<unsigned()>& read) {
  try {
    return "sum " + std::to_string(read());
  } catch (const Error& error) {
    return error.what();
  }
}

void test_every_dtype(const TempFolder& folder) {
  using enum uniflow::FileDType;
  for (const auto dtype : {BOOL, F4, F6_E2M3, F6_E3M2, U8, I8, F8_E5M2, F8_E4M3, F8_E8M0, F8_E4M3FNUZ, F8_E5M2FNUZ,
                           I16, U16, F16, BF16, I32, U32, F32, C64, F64, I64, U64}) {
    const std::string name = uniflow::name_of(dtype);
    check("reads " + name, [&] {
      const size_t bytes = uniflow::bits_of(dtype);  // eight elements
      const std::string range = "[0," + std::to_string(bytes) + "]";
      const auto file = SafetensorsFile::open(write(folder, one('"' + name + '"', "[2,4]", range, bytes)));
      const auto& entry = file->entries().at("w");
      if (entry.dtype != dtype || entry.shape != std::vector<int64_t>{2, 4} || entry.bytes != bytes) return "entry";
      return std::memcmp(entry.data, data_of(bytes).data(), bytes) == 0 ? "" : "data";
    });
  }
}

void test_good_files(const TempFolder& folder) {
  const auto opens = [&](const std::string& name, const std::string& bytes, size_t tensors, size_t metadata) {
    check("reads " + name, [&] {
      const auto file = SafetensorsFile::open(write(folder, bytes));
      if (file->path() != (folder.path / "a.safetensors").string()) return "path";
      if (file->metadata().size() != metadata) return "metadata";
      return file->entries().size() == tensors ? "" : "number of tensors";
    });
  };
  opens("no tensors", file_of("{}", 0), 0, 0);
  opens("only metadata", file_of(R"({"__metadata__":{"format":"pt","note":"\u00e9"}})", 0), 0, 2);
  opens("a scalar", one("\"F32\"", "[]", "[0,4]", 4), 1, 0);
  opens("an empty tensor of odd shape", one("\"F4\"", "[3,0,5]", "[0,0]", 0), 1, 0);
  opens("space behind the header", file_of(R"({"w":)" + tensor("\"U8\"", "[3]", "[0,3]") + "}  \n ", 3), 1, 0);
  opens("tensors in any order, an empty one between them",
        file_of(R"({"b":)" + tensor("\"U8\"", "[3]", "[4,7]") + R"(,"e":)" + tensor("\"U8\"", "[0]", "[4,4]") +
                    R"(,"a":)" + tensor("\"F32\"", "[1]", "[0,4]") + "}",
                7),
        3, 0);
  opens("an escaped name", file_of(R"({"a\"\n\ud83d\ude00":)" + tensor("\"U8\"", "[1]", "[0,1]") + "}", 1), 1, 0);
}

struct Corruption {
  const char* name;
  std::string bytes;
  const char* mentions;  // must be in the message, beside the file's name
};

std::vector<Corruption> corruptions_of_the_frame() {
  const std::string good = one("\"F32\"", "[2]", "[0,8]", 8);
  std::string lone_byte = good;
  lone_byte[10] = '\xff';
  return {
      {"empty file", "", "0 bytes"},
      {"seven bytes", std::string(7, '\1'), "7 bytes"},
      {"no header", length_field(0), "begins with {"},
      {"header length one past the end", length_field(3) + "{}", "at most 2"},
      {"header length of 2^64-1", length_field(~uint64_t{0}) + "{}", "18446744073709551615"},
      {"header over 100 MB", length_field(100'000'001) + std::string(100'000'001, ' '), "at most 100000000"},
      {"space before the header", file_of(" {}", 0), "begins with {"},
      {"byte order mark", file_of("\xef\xbb\xbf{}", 0), "\\xef"},
      {"header cut off", file_of(R"({"w":{"dtype":)", 0), "valid JSON"},
      {"text behind the header", file_of("{} x", 0), "valid JSON"},
      {"zero byte behind the header", file_of(std::string("{}\0", 3), 0), "zero byte"},
      {"comment", file_of("{/* hidden */}", 0), "valid JSON"},
      {"invalid UTF-8", lone_byte, "UTF-8"},
      {"half a surrogate pair", file_of(R"({"__metadata__":{"a":"\ud83d"}})", 0), "valid JSON"},
      {"data cut off", good.substr(0, good.size() - 1), "\"w\""},
      {"bytes behind the data", good + "x", "9"},
      {"data without tensors", file_of("{}", 1), "0 bytes of data"},
  };
}

std::vector<Corruption> corruptions_of_one_tensor() {
  const auto header = [](const std::string& value) { return file_of(R"({"w":)" + value + "}", 8); };
  return {
      {"tensor is a number", header("1"), "object"},
      {"tensor is null", header("null"), "null"},
      {"no shape", header(R"({"dtype":"F32","data_offsets":[0,8]})"), "no shape"},
      {"no data_offsets", header(R"({"dtype":"F32","shape":[2]})"), "no data_offsets"},
      {"unknown field", header(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1})"), "\"x\""},
      {"field twice", header(R"({"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]})"), "dtype"},
      {"unknown dtype", one("\"F33\"", "[2]", "[0,8]", 8), "F33"},
      {"dtype is a number", one("32", "[2]", "[0,8]", 8), "dtype"},
      {"shape is a number", one("\"F32\"", "2", "[0,8]", 8), "shape"},
      {"shape with a string", one("\"F32\"", "[\"2\"]", "[0,8]", 8), "shape"},
      {"shape with a negative number", one("\"F32\"", "[-2]", "[0,8]", 8), "-2"},
      {"shape with a fraction", one("\"F32\"", "[2.0]", "[0,8]", 8), "2.0"},
      {"shape in a shape", one("\"F32\"", "[[2]]", "[0,8]", 8), "an array"},
      {"deep nesting", one("\"F32\"", std::string(100'000, '['), "[0,8]", 8), "an array"},
      {"shape over 2^63", one("\"F32\"", "[9223372036854775808]", "[0,8]", 8), "2^63"},
      {"shape over 2^64", one("\"F32\"", "[18446744073709551618]", "[0,8]", 8), "18446744073709551618"},
      {"shape that overflows", one("\"U8\"", "[4294967296,4294967296]", "[0,0]", 0), "2^64"},
      {"shape that overflows beside a zero", one("\"U8\"", "[0,4294967296,4294967296]", "[0,0]", 0), "2^64"},
      {"bytes that overflow", one("\"F32\"", "[4611686018427387904]", "[0,0]", 0), "2^64"},
      {"half a byte", one("\"F4\"", "[3]", "[0,1]", 1), "whole bytes"},
      {"shape too large", one("\"F32\"", "[3]", "[0,8]", 8), "12 bytes"},
      {"shape too small", one("\"F32\"", "[1]", "[0,8]", 8), "4 bytes"},
      {"one offset", one("\"F32\"", "[2]", "[8]", 8), "two offsets"},
      {"three offsets", one("\"F32\"", "[2]", "[0,8,8]", 8), "two offsets"},
      {"negative offset", one("\"F32\"", "[2]", "[-8,0]", 8), "-8"},
      {"offset with an exponent", one("\"F32\"", "[2]", "[0,8e0]", 8), "8e0"},
      {"offsets as a string", one("\"F32\"", "[2]", "\"0,8\"", 8), "data_offsets"},
      {"offsets exchanged", one("\"F32\"", "[2]", "[8,0]", 8), "[8, 0]"},
      {"offsets that would wrap", one("\"F32\"", "[2]", "[18446744073709551608,0]", 8), "18446744073709551608"},
      {"hole before the tensor", one("\"F32\"", "[2]", "[4,12]", 12), "a hole"},
  };
}

std::vector<Corruption> corruptions_across_tensors() {
  const auto pair = [](const std::string& first, const std::string& second, size_t data_bytes) {
    return file_of(R"({"v":)" + first + R"(,"w":)" + second + "}", data_bytes);
  };
  const std::string head = tensor("\"U8\"", "[4]", "[0,4]");
  return {
      {"hole", pair(head, tensor("\"U8\"", "[3]", "[5,8]"), 8), "a hole"},
      {"overlap", pair(head, tensor("\"U8\"", "[5]", "[3,8]"), 8), "an overlap"},
      {"same bytes twice", pair(head, tensor("\"U8\"", "[4]", "[0,4]"), 4), "an overlap"},
      {"empty tensor inside another", pair(head, tensor("\"U8\"", "[0]", "[2,2]"), 4), "an overlap"},
      {"empty tensor past the end", pair(head, tensor("\"U8\"", "[0]", "[5,5]"), 4), "[5, 5]"},
      {"tensor twice", file_of(R"({"w":)" + head + R"(,"w":)" + head + "}", 4), "\"w\" twice"},
      {"tensor twice, once escaped", file_of(R"({"w":)" + head + R"(,"\u0077":)" + head + "}", 4), "\"w\" twice"},
      {"metadata twice", file_of(R"({"__metadata__":{},"__metadata__":{}})", 0), "twice"},
      {"metadata key twice", file_of(R"({"__metadata__":{"a":"1","a":"2"}})", 0), "\"a\" twice"},
      {"metadata is null", file_of(R"({"__metadata__":null})", 0), "__metadata__"},
      {"metadata with a number", file_of(R"({"__metadata__":{"a":1}})", 0), "\"a\""},
      {"metadata is a tensor", file_of(R"({"__metadata__":)" + head + "}", 4), "__metadata__"},
  };
}

/// The message of the Error(BadCheckpoint) that opening throws, checked for the file's name.
std::string refusal(const std::string& path, const std::string& mentions) {
  try {
    SafetensorsFile::open(path);
  } catch (const Error& error) {
    const std::string message = error.what();
    if (error.code != ErrorCode::BadCheckpoint) return std::string("code ") + uniflow::name_of(error.code);
    if (message.find(path.c_str()) == std::string::npos) return "file not named: " + message;
    if (message.find(mentions) == std::string::npos) return "no '" + mentions + "' in: " + message;
    return message.size() < 1000 ? "" : "a message of " + std::to_string(message.size()) + " bytes";
  }
  return "opened";
}

void test_corruptions(const TempFolder& folder) {
  for (const auto& list : {corruptions_of_the_frame(), corruptions_of_one_tensor(), corruptions_across_tensors()})
    for (const auto& [name, bytes, mentions] : list)
      check(std::string("refuses ") + name, [&] { return refusal(write(folder, bytes), mentions); });
  for (const auto& [name, bytes, mentions] : corruptions_of_one_tensor())
    check(std::string("names the tensor: ") + name, [&] { return refusal(write(folder, bytes), "tensor \"w\""); });
}

void test_not_a_file(const TempFolder& folder) {
  const std::string good = write(folder, file_of("{}", 0));
  const std::string pipe = (folder.path / "pipe").string();
  check("refuses a missing file", [&] { return refusal((folder.path / "none").string(), "No such file"); });
  check("refuses a folder", [&] { return refusal(folder.path.string(), "a folder"); });
  check("refuses a pipe without waiting", [&] {
    return ::mkfifo(pipe.c_str(), 0600) == 0 ? refusal(pipe, "pipe") : "mkfifo";
  });
  check("refuses a path with a zero byte", [&] { return refusal(good + std::string("\0.bak", 5), "zero byte"); });
}

/// Page faults that reading the file costs: none while its pages are there.
long faults_of_reading(const SafetensorsFile& file) {
  rusage before{}, after{};
  ::getrusage(RUSAGE_SELF, &before);
  [[maybe_unused]] const volatile unsigned sum = sum_of(file.entries());
  ::getrusage(RUSAGE_SELF, &after);
  return after.ru_minflt - before.ru_minflt + after.ru_majflt - before.ru_majflt;
}

void test_release(const TempFolder& folder) {
  const std::string path = write(folder, one("\"U8\"", "[16777216]", "[0,16777216]", 16777216));
  const auto file = SafetensorsFile::open(path);
  check("release() drops the pages, and they can be read again", [&]() -> std::string {
    const unsigned sum = sum_of(file->entries());
    const long kept = faults_of_reading(*file);
    file->release(file->entries().at("w"));
    const long released = faults_of_reading(*file);
    if (released <= kept) return "page faults: " + std::to_string(kept) + ", then " + std::to_string(released);
    return sum_of(file->entries()) == sum ? "" : "different data";
  });
  check("release() refuses a tensor of another file", [&] {
    const auto other = SafetensorsFile::open(path);
    const std::string outcome = outcome_of([&] { return file->release(other->entries().at("w")), 0u; });
    return outcome.find("another file") != std::string::npos ? "" : "not refused";
  });
}

/// Changes files at random, in ways that reach behind the first check: plain noise rarely does.
class Mutator {
 public:
  explicit Mutator(unsigned seed) : random_(seed) {}

  std::string mutate(std::string bytes) {
    for (size_t rounds = 1 + below(3); rounds > 0; --rounds) mutate_once(bytes);
    return bytes;
  }

 private:
  size_t below(size_t limit) { return limit == 0 ? 0 : random_() % limit; }

  void mutate_once(std::string& bytes) {
    switch (below(6)) {
      case 0:
        if (!bytes.empty()) bytes[below(bytes.size())] ^= static_cast<char>(1 << below(8));
        break;
      case 1: bytes.resize(below(bytes.size() + 1)); break;
      case 2: bytes.insert(below(bytes.size() + 1), data_of(1 + below(16))); break;
      case 3: edit_header_length(bytes); break;
      case 4: edit_digit(bytes); break;
      default: splice_token(bytes);
    }
  }

  void edit_header_length(std::string& bytes) {
    if (bytes.size() < 8) return;
    const uint64_t length = length_in(bytes);
    const uint64_t choices[] = {0, length - 1, length + 1, bytes.size() - 8, bytes.size(), ~below(16)};
    bytes.replace(0, 8, length_field(choices[below(std::size(choices))]));
  }

  void edit_digit(std::string& bytes) {
    const size_t digit = bytes.find_first_of("0123456789", 8 + below(bytes.size()));
    if (digit != std::string::npos) bytes[digit] = static_cast<char>('0' + below(10));
  }

  /// Inserts or overwrites a piece of JSON, and mostly corrects the header's length to match.
  void splice_token(std::string& bytes) {
    static const std::vector<std::string> tokens = {
        "{", "}", "[", "]", ",", ":", "\"", "\\", "\\u0000", "0", "-1", "1e9", "18446744073709551615", "null",
        "\"dtype\"", "\"shape\"", "\"data_offsets\"", "\"__metadata__\"", "\"F16\"", "{}", "[0,0]", ",\"w\":{}"};
    if (bytes.size() < 8 || length_in(bytes) > bytes.size() - 8) return;
    const uint64_t length = length_in(bytes);
    const std::string& token = tokens[below(tokens.size())];
    const size_t replaced = below(2) == 0 ? 0 : below(token.size() + 1);
    const size_t at = 8 + below(length + 1);
    bytes.replace(at, replaced, token);
    if (below(4) != 0) bytes.replace(0, 8, length_field(length + token.size() - replaced));
  }

  std::mt19937 random_;
};

/// Reads a file twice, mapped and from a heap block of exactly its size, where a sanitizer sees a read
/// that goes one byte too far. True if it opened.
bool opens_either_way(const TempFolder& folder, const std::string& bytes) {
  const std::string path = write(folder, bytes);
  const auto* chars = reinterpret_cast<const std::byte*>(bytes.data());
  const std::vector<std::byte> exact(chars, chars + bytes.size());
  const std::string mapped = outcome_of([&] {
    const auto file = SafetensorsFile::open(path);
    return sum_of(file->entries());
  });
  const std::string parsed =
      outcome_of([&] { return sum_of(SafetensorsFile::parse(exact.data(), exact.size(), path).entries); });
  if (mapped != parsed) throw std::runtime_error("mapped: " + mapped + ", but parsed: " + parsed);
  return mapped.starts_with("sum ");
}

void test_mutations(const TempFolder& folder, int count, unsigned seed) {
  const std::vector<std::string> seeds = {
      one("\"F32\"", "[2,3]", "[0,24]", 24),
      file_of(R"({"__metadata__":{"format":"pt"},"a":)" + tensor("\"BF16\"", "[4,2]", "[0,16]") + R"(,"b":)" +
                  tensor("\"U8\"", "[0]", "[16,16]") + R"(,"c":)" + tensor("\"F16\"", "[10]", "[16,36]") + "}  ",
              36),
      file_of("{}", 0),
  };
  check(std::to_string(count) + " mutations from seed " + std::to_string(seed), [&] {
    Mutator mutator(seed);
    int opened = 0;
    for (int i = 0; i < count; ++i) opened += opens_either_way(folder, mutator.mutate(seeds[i % seeds.size()]));
    std::printf("      %d opened, %d refused\n", opened, count - opened);
    return count >= 1000 && (opened == 0 || opened == count) ? "mutations that all end alike test nothing" : "";
  });
}

}  // namespace

int main(int argc, char** argv) {
  const TempFolder folder;
  test_every_dtype(folder);
  test_good_files(folder);
  test_corruptions(folder);
  test_not_a_file(folder);
  test_release(folder);
  test_mutations(folder, argc > 1 ? std::atoi(argv[1]) : 20000,
                 argc > 2 ? static_cast<unsigned>(std::strtoul(argv[2], nullptr, 10)) : 1);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
