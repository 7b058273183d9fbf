/// JPEG decoding and image resizing, on the host pool, so they never wait behind the model's work.
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "bindings/define.h"
#include "bindings/ops.h"
#include "native/core/host_pool.h"
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

Resampling::Mode mode(Napi::Value v) {
  const std::string s = string(v, "mode");
  if (s == "cover") return Resampling::Mode::Cover;
  if (s == "shortest_edge") return Resampling::Mode::ShortestEdge;
  if (s == "stretch") return Resampling::Mode::Stretch;
  throw Error(ErrorCode::BadInput, "mode", "'cover', 'shortest_edge' or 'stretch'", "'" + s + "'");
}

int pixels(Napi::Value v, const char* name) {
  const int64_t n = integer(v, name);
  if (n < 1 || n > (1 << 20)) throw Error(ErrorCode::BadInput, name, "1 to 2^20 pixels", std::to_string(n));
  return static_cast<int>(n);
}

Resampling resampling(Napi::Value v) {
  const Napi::Object o = object(v, "to");
  Resampling to{pixels(o["width"], "width"), pixels(o["height"], "height"), mode(o["mode"]), 0, filter(o["filter"])};
  if (to.mode == Resampling::Mode::ShortestEdge) to.edge = pixels(o["edge"], "edge");
  return to;
}

/// The bytes of a packed RGB image.
uint8_t* rgb(Napi::Value v, const char* name, int width, int height) {
  const HostArray a = host_array(v, name);
  const size_t want = size_t{3} * static_cast<size_t>(width) * static_cast<size_t>(height);
  if (a.dtype != DType::UInt8 || a.bytes != want)
    throw Error(ErrorCode::BadInput, name, std::to_string(want) + " bytes of RGB", std::to_string(a.bytes) + " of " + name_of(a.dtype));
  return reinterpret_cast<uint8_t*>(a.data);
}

/// The content of a handle: a file that was read, or the caller's bytes.
struct OpenJpeg {
  std::optional<Jpeg> jpeg;
  std::shared_ptr<const Bytes> read;
};

struct Handle {
  OpenJpeg open;
  Napi::ObjectReference bytes;
};

constexpr napi_type_tag kJpegTag = {0x6b0c52e97f3d4a18, 0x92d7e41ba85c360f};

/// Reports the compressed bytes to V8, because a handle may be dropped without being decoded.
void account(Napi::Env env, const OpenJpeg& open, int64_t sign) {
  if (open.read) Napi::MemoryManagement::AdjustExternalMemory(env, sign * static_cast<int64_t>(open.read->size));
}

/// @param source the caller's bytes, kept alive by the handle
Napi::Value wrap(Napi::Env env, OpenJpeg open, Napi::Object source) {
  auto handle = std::make_unique<Handle>(Handle{std::move(open), {}});
  if (!handle->open.read) handle->bytes = Napi::Persistent(source);
  auto file = Napi::External<Handle>::New(env, handle.get(), [](Napi::Env e, Handle* h) {
    account(e, h->open, -1);
    delete h;
  });
  const OpenJpeg& kept = handle.release()->open;
  account(env, kept, 1);
  file.TypeTag(&kJpegTag);
  auto result = Napi::Object::New(env);
  result["width"] = kept.jpeg->width;
  result["height"] = kept.jpeg->height;
  result["file"] = file;
  return result;
}

/// openJpeg(path or bytes, maxPixels): { width, height, file }, or undefined
Napi::Value open_jpeg(const Info& info) {
  const double most = number(info[1], "maxPixels");
  const auto open = std::make_shared<OpenJpeg>();
  const std::string path = info[0].IsString() ? string(info[0], "path") : "";
  std::span<const uint8_t> bytes;
  if (!info[0].IsString()) {
    const HostArray a = host_array(info[0], "file");
    bytes = {reinterpret_cast<const uint8_t*>(a.data), a.bytes};
  }
  auto run = [=, from_file = info[0].IsString()](const Run&) {
    std::optional<Bytes> read;
    if (from_file && !(read = read_jpeg_file(path))) return;
    open->jpeg = read_jpeg_header(read ? read->span() : bytes);
    if (open->jpeg && !(double{1} * open->jpeg->width * open->jpeg->height <= most)) open->jpeg.reset();
    if (open->jpeg && read) open->read = std::make_shared<Bytes>(*std::move(read));
  };
  auto result = [=](Napi::Env env, Napi::Object kept) { return open->jpeg ? wrap(env, std::move(*open), kept) : env.Undefined(); };
  return Environment::of(info.Env()).submit(HostPool::instance(), {"openJpeg", {}, {}, run}, keep(info.Env(), {info[0]}), result);
}

/// decodeJpeg(file, into, resampling or undefined): whether the file is complete
Napi::Value decode_jpeg(const Info& info) {
  if (!info[0].IsExternal() || !info[0].As<Napi::External<Handle>>().CheckTypeTag(&kJpegTag))
    throw Error(ErrorCode::BadInput, "file", "an open JPEG", "something else");
  OpenJpeg& handle = info[0].As<Napi::External<Handle>>().Data()->open;
  if (!handle.jpeg) throw Error(ErrorCode::BadInput, "file", "a JPEG that was not decoded yet", "one that was");
  std::optional<Resampling> to;
  if (!info[2].IsUndefined()) to = resampling(info[2]);
  uint8_t* out = to ? rgb(info[1], "into", to->width, to->height) : rgb(info[1], "into", handle.jpeg->width, handle.jpeg->height);
  // The command frees the memory, so it does not wait for the garbage collector to find the handle.
  account(info.Env(), handle, -1);
  const OpenJpeg open = std::exchange(handle, {});
  const auto whole = std::make_shared<bool>();
  auto run = [=](const Run& run) {
    *whole = to ? uniflow::decode_jpeg(*open.jpeg, *to, out, run.token) : uniflow::decode_jpeg(*open.jpeg, out, run.token);
  };
  auto result = [=](Napi::Env env, Napi::Object) -> Napi::Value { return Napi::Boolean::New(env, *whole); };
  return submit_beside(info, "decodeJpeg", run, {info[0], info[1]}, result);
}

/// resample(pixels, width, height, into, to)
Napi::Value resample(const Info& info) {
  const int width = pixels(info[1], "width"), height = pixels(info[2], "height");
  const Resampling to = resampling(info[4]);
  const ImageView in = ImageView::packed(rgb(info[0], "pixels", width, height), width, height);
  uint8_t* out = rgb(info[3], "into", to.width, to.height);
  auto run = [=](const Run&) { uniflow::resample(in, out, to); };
  return submit_beside(info, "resample", run, {info[0], info[3]});
}

}  // namespace

void define_images(Napi::Object exports) {
  define(exports, "openJpeg", open_jpeg);
  define(exports, "decodeJpeg", decode_jpeg);
  define(exports, "resample", resample);
}

}  // namespace uniflow::bindings
