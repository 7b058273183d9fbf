/// libFuzzer entry point for the checkpoint reader: whatever the bytes, parse() returns entries that lie
/// inside them or throws Error; anything else is a crash.
///
///   clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -I. native/core/safetensors.cpp native/core/json.cpp
///       native/test/safetensors_fuzz.cpp -o safetensors_fuzz
#include <cstddef>
#include <cstdint>

#include "native/core/error.h"
#include "native/core/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto* bytes = reinterpret_cast<const std::byte*>(data);
  try {
    const auto contents = uniflow::SafetensorsFile::parse(bytes, size, "fuzz.safetensors");
    for (const auto& [name, entry] : contents.entries) {
      if (entry.data < bytes || entry.bytes > size || entry.data + entry.bytes > bytes + size) __builtin_trap();
      // Reading through a volatile pointer, so that the sanitizer sees every access.
      for (const volatile std::byte* p = entry.data; p != entry.data + entry.bytes; ++p) (void)*p;
    }
  } catch (const uniflow::Error& error) {
    if (error.code != uniflow::ErrorCode::BadCheckpoint) __builtin_trap();
  }
  return 0;
}
