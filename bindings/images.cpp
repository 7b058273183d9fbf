/// Resizing of decoded pictures, on the host's side stream: it never waits behind the model's work.
#include "bindings/convert.h"
#include "bindings/env.h"
#include "bindings/ops.h"
#include "native/cpu/resample.h"

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

std::byte* bytes(Napi::Value v, const char* name, int width, int height) {
  const HostArray a = host_array(v, name);
  const size_t want = size_t{3} * static_cast<size_t>(width) * static_cast<size_t>(height);
  if (a.dtype != DType::UInt8 || a.bytes != want)
    throw Error(ErrorCode::BadInput, name, std::to_string(want) + " bytes of RGB", std::to_string(a.bytes) + " of " + name_of(a.dtype));
  return a.data;
}

/// resample(pixels, width, height, into, { width, height, mode, edge, filter })
Napi::Value resample(const Napi::CallbackInfo& info) {
  const int in_width = pixels(info[1], "width"), in_height = pixels(info[2], "height");
  const Napi::Object o = object(info[4], "options");
  const int width = pixels(o["width"], "width"), height = pixels(o["height"], "height");
  const std::string mode = string(o["mode"], "mode");
  const Filter f = filter(o["filter"]);
  const int edge = mode == "shortest_edge" ? pixels(o["edge"], "edge") : 0;
  if (mode != "cover" && mode != "shortest_edge" && mode != "stretch")
    throw Error(ErrorCode::BadInput, "mode", "'cover', 'shortest_edge' or 'stretch'", "'" + mode + "'");
  const ImageView in = ImageView::packed(reinterpret_cast<uint8_t*>(bytes(info[0], "pixels", in_width, in_height)), in_width, in_height);
  uint8_t* out = reinterpret_cast<uint8_t*>(bytes(info[3], "into", width, height));
  auto keep = Napi::Array::New(info.Env(), 2);
  keep[0u] = info[0];
  keep[1u] = info[3];
  auto run = [=](const Run&) {
    if (mode == "cover") center_crop(in, out, width, height);
    else if (mode == "stretch") resize(in, out, width, height, f);
    else shortest_edge_crop(in, out, width, height, edge, f);
  };
  return Environment::of(info.Env()).submit(Stream::side(), {"resample", {}, {}, run}, keep);
}

}  // namespace

void define_images(Napi::Object exports) {
  exports["resample"] = Napi::Function::New(
      exports.Env(), [](const Napi::CallbackInfo& i) { return guarded(i.Env(), [&] { return resample(i); }); }, "resample");
}

}  // namespace uniflow::bindings
