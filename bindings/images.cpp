/// Decoding of JPEG files and resizing of pictures, on the host's side stream: it never waits behind the model's work.
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "bindings/define.h"
#include "bindings/ops.h"
#include "native/image/jpeg.h"
#include "native/image/resample.h"

namespace uniflow::bindings {
namespace {

Filter filter(Napi::Value v) {
  const std::string s = string(v, "filter");
  if (s == "box") return Filter::Box;
  if (s == "bilinear") return Filter::Bilinear;
  if (s == "bicubic") return Filter::Bicubic;
  if (s == "lanczos") return Filter::Lanczos;
  throw Error(ErrorCode::BadInput, "filter", "'box', 'bilinear', 'bicubic' or 'lanczos'", "'" + s + "'");
}

int pixels(Napi::Value v, const char* name) {
  const int64_t n = integer(v, name);
  if (n < 1 || n > (1 << 20)) throw Error(ErrorCode::BadInput, name, "1 to 2^20 pixels", std::to_string(n));
  return static_cast<int>(n);
}

size_t rgb_bytes(int width, int height) { return size_t{3} * static_cast<size_t>(width) * static_cast<size_t>(height); }

uint8_t* rgb(Napi::Value v, const char* name, int width, int height) {
  const HostArray a = host_array(v, name);
  const size_t want = rgb_bytes(width, height);
  if (a.dtype != DType::UInt8 || a.bytes != want)
    throw Error(ErrorCode::BadInput, name, std::to_string(want) + " bytes of RGB", std::to_string(a.bytes) + " of " + name_of(a.dtype));
  return reinterpret_cast<uint8_t*>(a.data);
}

std::span<const uint8_t> bytes(Napi::Value v) {
  const HostArray a = host_array(v, "file");
  return {reinterpret_cast<const uint8_t*>(a.data), a.bytes};
}

constexpr napi_type_tag kFileTag = {0x6b0c52e97f3d4a18, 0x92d7e41ba85c360f};
using FileRef = std::shared_ptr<const JpegFile>;

FileRef& file(Napi::Value v) {
  if (!v.As<Napi::External<FileRef>>().CheckTypeTag(&kFileTag)) throw Error(ErrorCode::BadInput, "file", "an open JPEG", "something else");
  return *v.As<Napi::External<FileRef>>().Data();
}

/// A resize to do: { width, height, mode, edge, filter }
struct Resampling {
  int width, height;
  enum { Cover, ShortestEdge, Stretch } mode;
  int edge;
  Filter filter;

  explicit Resampling(Napi::Object o) : width(pixels(o["width"], "width")), height(pixels(o["height"], "height")) {
    const std::string s = string(o["mode"], "mode");
    if (s != "cover" && s != "shortest_edge" && s != "stretch")
      throw Error(ErrorCode::BadInput, "mode", "'cover', 'shortest_edge' or 'stretch'", "'" + s + "'");
    mode = s == "cover" ? Cover : s == "stretch" ? Stretch : ShortestEdge;
    edge = mode == ShortestEdge ? pixels(o["edge"], "edge") : 0;
    filter = bindings::filter(o["filter"]);
  }

  void operator()(const ImageView& in, uint8_t* out) const {
    switch (mode) {
      case Cover: return center_crop(in, out, width, height);
      case Stretch: return resize(in, out, width, height, filter);
      case ShortestEdge: return shortest_edge_crop(in, out, width, height, edge, filter);
    }
  }
};

Napi::Object opened(Napi::Env env, JpegSize size, Napi::Value file) {
  auto result = Napi::Object::New(env);
  result["width"] = size.width;
  result["height"] = size.height;
  result["file"] = file;
  return result;
}

/// openJpeg(path or bytes): { width, height, file }, or undefined; of a path, a promise of it
Napi::Value open_jpeg(const Info& info) {
  if (!info[0].IsString()) {
    const auto size = read_jpeg_size(bytes(info[0]));
    return size ? opened(info.Env(), *size, info[0]) : info.Env().Undefined();
  }
  const auto found = std::make_shared<std::optional<JpegFile>>();
  auto run = [found, path = string(info[0], "path")](const Run&) { *found = uniflow::open_jpeg(path); };
  auto result = [found](Napi::Env env) -> Napi::Value {
    if (!*found) return env.Undefined();
    auto* ref = new FileRef(std::make_shared<JpegFile>(*std::move(*found)));
    auto file = Napi::External<FileRef>::New(env, ref, [](Napi::Env, FileRef* r) { delete r; });
    file.TypeTag(&kFileTag);
    return opened(env, (*ref)->size, file);
  };
  return Environment::of(info.Env()).submit(Stream::side(), {"openJpeg", {}, {}, run}, keep(info.Env(), {}), result);
}

/// decodeJpeg(file, width, height, into, resampling or undefined)
Napi::Value decode_jpeg(const Info& info) {
  FileRef held;  // until the command has run, no longer: the garbage collector would take its time
  if (info[0].IsExternal()) held = std::exchange(file(info[0]), std::make_shared<JpegFile>());
  const auto in = held ? held->span() : bytes(info[0]);
  const JpegSize size = {pixels(info[1], "width"), pixels(info[2], "height")};
  std::optional<Resampling> resampling;
  if (!info[4].IsUndefined()) resampling.emplace(object(info[4], "to"));
  uint8_t* out = resampling ? rgb(info[3], "into", resampling->width, resampling->height) : rgb(info[3], "into", size.width, size.height);
  auto run = [=, held = std::move(held)](const Run&) {
    if (!resampling) return uniflow::decode_jpeg(in, size, out);
    const auto picture = std::make_unique_for_overwrite<uint8_t[]>(rgb_bytes(size.width, size.height));
    uniflow::decode_jpeg(in, size, picture.get());
    (*resampling)(ImageView::packed(picture.get(), size.width, size.height), out);
  };
  return Environment::of(info.Env()).submit(Stream::side(), {"decodeJpeg", {}, {}, run}, keep(info.Env(), {info[0], info[3]}));
}

/// resample(pixels, width, height, into, resampling)
Napi::Value resample(const Info& info) {
  const int width = pixels(info[1], "width"), height = pixels(info[2], "height");
  const Resampling resampling(object(info[4], "to"));
  const ImageView in = ImageView::packed(rgb(info[0], "pixels", width, height), width, height);
  uint8_t* out = rgb(info[3], "into", resampling.width, resampling.height);
  auto run = [=](const Run&) { resampling(in, out); };
  return Environment::of(info.Env()).submit(Stream::side(), {"resample", {}, {}, run}, keep(info.Env(), {info[0], info[3]}));
}

}  // namespace

void define_images(Napi::Object exports) {
  define(exports, "openJpeg", open_jpeg);
  define(exports, "decodeJpeg", decode_jpeg);
  define(exports, "resample", resample);
}

}  // namespace uniflow::bindings
