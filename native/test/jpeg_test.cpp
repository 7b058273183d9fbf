/// Tests of native/image/jpeg: against a plain decode loop of libjpeg for files that libjpeg makes here, against the definition of the EXIF
/// orientations, and with damaged files, which may be refused but never believed.
#include "native/image/jpeg.h"

#include <cstdio>  // jpeglib.h needs it

#include <jpeglib.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "native/core/error.h"

namespace {

using uniflow::CancelToken;
using uniflow::decode_jpeg;
using uniflow::read_jpeg_file;
using uniflow::read_jpeg_header;
using Bytes = std::vector<uint8_t>;

struct JpegSize {
  int width, height;
};

int passed = 0, failed = 0;

void report(bool ok, const std::string& name) {
  std::printf("%s %s\n", ok ? "ok  " : "FAIL", name.c_str());
  ++(ok ? passed : failed);
}

std::string text(JpegSize s) { return std::to_string(s.width) + "x" + std::to_string(s.height); }
size_t rgb_bytes(JpegSize s) { return size_t{3} * static_cast<size_t>(s.width) * static_cast<size_t>(s.height); }
JpegSize swapped(JpegSize s) { return {s.height, s.width}; }

// ---- Files, made by libjpeg. Its errors end the program: there must be none.

struct Encoding {
  const char* name;
  J_COLOR_SPACE space;
  int h = 1, v = 1;  // how many times finer the first component is than the others
  bool progressive = false;
  unsigned restart = 0;  // blocks between two restart markers
  int quality = 85;
};

constexpr Encoding kEncodings[] = {
    {"grey", JCS_GRAYSCALE},
    {"grey, progressive", JCS_GRAYSCALE, 1, 1, true},
    {"4:4:4", JCS_YCbCr},
    {"4:2:2", JCS_YCbCr, 2, 1},
    {"4:2:0", JCS_YCbCr, 2, 2},
    {"4:4:0", JCS_YCbCr, 1, 2},
    {"4:1:1", JCS_YCbCr, 4, 1},
    {"4:2:0, progressive", JCS_YCbCr, 2, 2, true},
    {"4:4:4, quality 100", JCS_YCbCr, 1, 1, false, 0, 100},
    {"4:2:0, restarts", JCS_YCbCr, 2, 2, false, 3},
    {"4:2:2, progressive, restarts", JCS_YCbCr, 2, 1, true, 5},
    {"RGB", JCS_RGB},
    {"RGB, progressive", JCS_RGB, 1, 1, true},
    {"CMYK", JCS_CMYK},
};
constexpr Encoding kGrey = kEncodings[0], kGreyProgressive = kEncodings[1];
constexpr Encoding k420 = kEncodings[4], k420Restarts = kEncodings[9];

/// Curves with hard squares between them. `scans`: instead of libjpeg's own.
Bytes encode(const Encoding& how, JpegSize size, std::span<const jpeg_scan_info> scans = {}) {
  jpeg_compress_struct jpeg;
  jpeg_error_mgr errors;
  jpeg.err = jpeg_std_error(&errors);
  jpeg_create_compress(&jpeg);
  unsigned char* data = nullptr;
  unsigned long bytes = 0;
  jpeg_mem_dest(&jpeg, &data, &bytes);
  jpeg.image_width = static_cast<JDIMENSION>(size.width);
  jpeg.image_height = static_cast<JDIMENSION>(size.height);
  jpeg.input_components = how.space == JCS_GRAYSCALE ? 1 : how.space == JCS_CMYK ? 4 : 3;
  jpeg.in_color_space = how.space == JCS_YCbCr ? JCS_RGB : how.space;
  jpeg_set_defaults(&jpeg);
  jpeg_set_colorspace(&jpeg, how.space);
  jpeg_set_quality(&jpeg, how.quality, TRUE);
  jpeg.comp_info[0].h_samp_factor = how.h;
  jpeg.comp_info[0].v_samp_factor = how.v;
  jpeg.restart_interval = how.restart;
  if (how.progressive) jpeg_simple_progression(&jpeg);
  if (!scans.empty()) {
    jpeg.scan_info = scans.data();
    jpeg.num_scans = static_cast<int>(scans.size());
  }
  jpeg_start_compress(&jpeg, TRUE);
  Bytes row(static_cast<size_t>(jpeg.input_components) * jpeg.image_width);
  while (jpeg.next_scanline < jpeg.image_height) {
    const unsigned y = jpeg.next_scanline;
    for (unsigned i = 0; i < row.size(); ++i) {
      const unsigned c = i % static_cast<unsigned>(jpeg.input_components), x = i / static_cast<unsigned>(jpeg.input_components);
      row[i] = static_cast<uint8_t>((x / 5 + y / 3) % 4 == 0 ? 255 * (c % 2) : x * 7 + y * 3 + x * y * (c + 1) / 16 + c * 85);
    }
    JSAMPROW rows[] = {row.data()};
    jpeg_write_scanlines(&jpeg, rows, 1);
  }
  jpeg_finish_compress(&jpeg);
  jpeg_destroy_compress(&jpeg);
  Bytes out(data, data + bytes);
  std::free(data);
  return out;
}

using Parts = std::vector<std::span<const uint8_t>>;

Bytes joined(const Parts& parts) {
  Bytes out;
  for (const auto part : parts) {
    for (const uint8_t byte : part) out.push_back(byte);  // not insert: GCC 12 warns of overflows that it imagines there
  }
  return out;
}

/// An APP1 segment that says so, put where EXIF lies in a file: at its start.
Bytes with_orientation(const Bytes& file, int orientation, bool big_endian) {
  const auto o = static_cast<uint8_t>(orientation);
  const Bytes little = {'I', 'I', 42, 0, 8, 0, 0, 0, 1, 0, 0x12, 1, 3, 0, 1, 0, 0, 0, o, 0, 0, 0, 0, 0, 0, 0};
  const Bytes big = {'M', 'M', 0, 42, 0, 0, 0, 8, 0, 1, 1, 0x12, 0, 3, 0, 0, 0, 1, 0, o, 0, 0, 0, 0, 0, 0};
  const Bytes& tiff = big_endian ? big : little;
  const uint8_t start[] = {0xFF, 0xD8, 0xFF, 0xE1, 0, static_cast<uint8_t>(2 + 6 + tiff.size()), 'E', 'x', 'i', 'f', 0, 0};
  return joined({start, tiff, std::span(file).subspan(2)});
}

/// The file with the bytes of its last scan `times` times more.
Bytes with_last_scan_repeated(const Bytes& file, int times) {
  constexpr uint8_t kScan[] = {0xFF, 0xDA};
  const std::span all(file), end = all.last(2);
  const auto scan = static_cast<size_t>(std::find_end(file.begin(), file.end(), std::begin(kScan), std::end(kScan)) - file.begin());
  Parts parts(static_cast<size_t>(times), all.subspan(scan, all.size() - end.size() - scan));
  parts.insert(parts.begin(), all.first(all.size() - end.size()));
  parts.push_back(end);
  return joined(parts);
}

// ---- The references

/// Row by row, as the file has them.
Bytes plainly_decoded(const Bytes& file) {
  jpeg_decompress_struct jpeg;
  jpeg_error_mgr errors;
  jpeg.err = jpeg_std_error(&errors);
  jpeg_create_decompress(&jpeg);
  jpeg_mem_src(&jpeg, file.data(), file.size());
  jpeg_read_header(&jpeg, TRUE);
  jpeg.out_color_space = JCS_RGB;
  jpeg_start_decompress(&jpeg);
  Bytes out(size_t{3} * jpeg.output_width * jpeg.output_height);
  while (jpeg.output_scanline < jpeg.output_height) {
    JSAMPROW rows[] = {out.data() + size_t{3} * jpeg.output_width * jpeg.output_scanline};
    jpeg_read_scanlines(&jpeg, rows, 1);
  }
  jpeg_finish_decompress(&jpeg);
  jpeg_destroy_decompress(&jpeg);
  return out;
}

/// EXIF 2.32, 4.6.4 A, Orientation: the sides of the picture at which the file's first row and first column are.
struct Sides {
  const char *row, *column;
};
constexpr Sides kSides[] = {{"top", "left"}, {"top", "right"}, {"bottom", "right"}, {"bottom", "left"},
                            {"left", "top"}, {"right", "top"}, {"right", "bottom"}, {"left", "bottom"}};

Bytes plainly_turned(const Bytes& in, JpegSize stored, int orientation) {
  const auto [row, column] = kSides[orientation - 1];
  const JpegSize upright = orientation < 5 ? stored : swapped(stored);
  Bytes out(in.size());
  for (int y = 0; y < stored.height; ++y) {
    for (int x = 0; x < stored.width; ++x) {
      int to_x = 0, to_y = 0;
      const auto place = [&](const std::string& side, int distance) {
        if (side == "left") to_x = distance;
        if (side == "right") to_x = upright.width - 1 - distance;
        if (side == "top") to_y = distance;
        if (side == "bottom") to_y = upright.height - 1 - distance;
      };
      place(row, y);
      place(column, x);
      std::copy_n(in.begin() + 3 * (y * stored.width + x), 3, out.begin() + 3 * (to_y * upright.width + to_x));
    }
  }
  return out;
}

// ---- What is tested, with arrays of exactly their size, for the sanitizers

std::optional<JpegSize> read_jpeg_size(std::span<const uint8_t> file) {
  const auto jpeg = read_jpeg_header(file);
  if (!jpeg) return std::nullopt;
  return JpegSize{jpeg->width, jpeg->height};
}

/// As if the header had said this size.
std::optional<Bytes> decoded(std::span<const uint8_t> file, JpegSize size) {
  auto jpeg = read_jpeg_header(file);
  if (!jpeg) return std::nullopt;
  jpeg->width = size.width;
  jpeg->height = size.height;
  Bytes out(rgb_bytes(size), 0xA5);
  if (!decode_jpeg(*jpeg, out.data(), CancelToken())) return std::nullopt;
  return out;
}

bool is(std::optional<JpegSize> got, JpegSize want) { return got && got->width == want.width && got->height == want.height; }

constexpr JpegSize kSizes[] = {{1, 1}, {7, 17}, {17, 7}, {1025, 3}, {3, 1025}, {33, 64}};

void test_encodings() {
  for (const Encoding& how : kEncodings) {
    for (const JpegSize size : kSizes) {
      const std::string name = std::string(how.name) + ", " + text(size);
      const Bytes file = encode(how, size);
      if (how.space == JCS_CMYK) report(!read_jpeg_size(file) && !decoded(file, size), name + ": declined");
      else report(is(read_jpeg_size(file), size) && decoded(file, size) == plainly_decoded(file), name);
    }
  }
}

void test_orientations() {
  for (int orientation = 1; orientation <= 8; ++orientation) {
    for (const bool big_endian : {false, true}) {
      bool same = true;
      for (const JpegSize stored : kSizes) {
        const Bytes plain = encode(k420, stored);
        const Bytes file = with_orientation(plain, orientation, big_endian);
        const JpegSize size = orientation < 5 ? stored : swapped(stored);
        same = same && is(read_jpeg_size(file), size) && decoded(file, size) == plainly_turned(plainly_decoded(plain), stored, orientation);
      }
      report(same, "orientation " + std::to_string(orientation) + (big_endian ? ", big-endian" : ", little-endian"));
    }
  }
}

void test_other_size() {
  const JpegSize size{17, 7};
  const Bytes plain = encode(k420, size), turned = with_orientation(plain, 6, true);
  for (const JpegSize other : {JpegSize{17, 8}, {18, 7}, {16, 7}, {7, 17}, {0, 0}}) report(!decoded(plain, other), "17x7 is not " + text(other));
  report(!decoded(turned, size) && decoded(turned, swapped(size)), "17x7 turned by a quarter is not 17x7");
}

void test_files() {
  namespace fs = std::filesystem;
  const fs::path folder = fs::temp_directory_path() / ("uniflow-jpeg-test-" + std::to_string(std::random_device()()));
  fs::create_directory(folder);
  const auto written = [&](const char* name, const Bytes& bytes) {
    const fs::path path = folder / name;
    std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    return path.string();
  };
  const JpegSize size{33, 64};
  const Bytes file = with_orientation(encode(k420, size), 8, false);
  const std::string picture = written("a picture, 写真.jpg", file);
  const auto read = read_jpeg_file(picture);
  report(read && std::ranges::equal(read->span(), file), "a file: its bytes");

  report(!read_jpeg_file((folder / "none.jpg").string()), "no file");
  report(!read_jpeg_file(folder.string()), "a directory");
  report(!read_jpeg_file(""), "no name");
  report(!read_jpeg_file(picture + std::string("\0.png", 5)), "a name with a zero in it");
  report(!read_jpeg_file("/dev/zero"), "a device");
  report(!read_jpeg_file(written("empty", {})), "an empty file");
  report(!read_jpeg_file(written("one", {0xFF})), "a file of one byte");
  report(!read_jpeg_file(written("text", {'h', 'e', 'l', 'l', 'o'})), "text");
  fs::resize_file(picture, uintmax_t{1} << 31);
  report(!read_jpeg_file(picture), "2 GiB");
  fs::remove_all(folder);
}

void test_pipe() {
  const std::string path = (std::filesystem::temp_directory_path() / ("uniflow-jpeg-pipe-" + std::to_string(std::random_device()()))).string();
  mkfifo(path.c_str(), 0600);
  std::atomic<bool> connected{false};
  std::thread writer([&] {
    const int fd = open(path.c_str(), O_WRONLY);
    connected = true;
    close(fd);
  });
  report(!read_jpeg_file(path), "a pipe");
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  report(!connected, "who writes into it still waits for a reader");
  close(open(path.c_str(), O_RDONLY));
  writer.join();
  std::filesystem::remove(path);
}

void test_incomplete() {
  const jpeg_scan_info only_dc[] = {{1, {0}, 0, 0, 0, 0}}, no_refinement[] = {{1, {0}, 0, 0, 0, 0}, {1, {0}, 1, 63, 0, 1}};
  const JpegSize size{33, 31};
  report(!decoded(encode(kGrey, size, only_dc), size), "only the first coefficients, which each version smooths in its own way");
  report(!decoded(encode(kGrey, size, no_refinement), size), "coefficients without their last bit");
}

void test_cancelled() {
  const Bytes file = encode(kGreyProgressive, {33, 31});
  const auto jpeg = read_jpeg_header(file);
  Bytes out(rgb_bytes({33, 31}));
  CancelToken token;
  token.cancel();
  bool aborted = false;
  try {
    decode_jpeg(*jpeg, out.data(), token);
  } catch (const uniflow::Error& error) {
    aborted = error.code == uniflow::ErrorCode::Aborted;
  }
  report(aborted, "a cancelled decode is ABORTED");
}

void test_cut_short() {
  for (const Encoding& how : {kGreyProgressive, k420, k420Restarts}) {
    const JpegSize size{33, 31};
    const Bytes file = with_orientation(encode(how, size), 3, true);
    size_t believed = 0;
    for (size_t n = 0; n < file.size(); ++n) {
      const Bytes cut(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(n));
      const auto found = read_jpeg_size(cut);
      if ((found && !is(found, size)) || decoded(cut, size)) ++believed;
    }
    report(believed == 0, std::string("cut short anywhere, ") + how.name);
  }
}

void test_many_scans() {
  const jpeg_scan_info scans[] = {{1, {0}, 0, 0, 0, 0}, {1, {0}, 1, 63, 0, 0}};
  const JpegSize size{640, 640};
  const Bytes file = encode(kGrey, size, scans);
  report(decoded(with_last_scan_repeated(file, 98), size) == plainly_decoded(file), "a hundred scans");
  report(!decoded(with_last_scan_repeated(file, 99), size), "one more is too many");
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Each is looked at once: where libjpeg keeps segments, it goes through all that it has to append one.
void test_many_segments() {
  const Bytes plain = encode(kGrey, {7, 17});
  Bytes segments;
  for (int i = 0; i < 1 << 18; ++i) segments.insert(segments.end(), {0xFF, 0xE1, 0, 2});
  const std::span all(plain);
  const Bytes file = joined({all.first(2), segments, all.subspan(2)});
  const auto begin = std::chrono::steady_clock::now();
  const bool same = decoded(file, {7, 17}) == plainly_decoded(plain);
  report(same && seconds_since(begin) < 2, "a quarter of a million empty segments");
}

/// Nothing is said of what comes out: it must not crash, nor take long for so few bytes.
void test_mutations() {
  constexpr int kMutations = 10000;
  std::mt19937 random(1);
  const auto below = [&](size_t n) { return static_cast<size_t>(random()) % n; };  // not a distribution, which differs between libraries
  std::vector<Bytes> files;
  for (const Encoding& how : kEncodings) {
    files.push_back(encode(how, {19, 21}));
    files.push_back(with_orientation(encode(how, {18, 9}), static_cast<int>(1 + files.size() % 8), files.size() % 4 < 2));
  }
  files.push_back(with_last_scan_repeated(files[2], 150));
  int sized = 0, whole = 0;
  double slowest = 0;
  for (int i = 0; i < kMutations; ++i) {
    Bytes file = files[below(files.size())];
    const size_t header = std::min<size_t>(file.size(), below(3) == 0 ? 48 : file.size());  // EXIF more often than its share of the bytes
    for (size_t n = 1 + below(4); n > 0; --n) {
      uint8_t& byte = file[below(header)];
      switch (below(4)) {
        case 0: byte = static_cast<uint8_t>(random()); break;
        case 1: byte = below(2) ? 0xFF : 0; break;
        default: byte = static_cast<uint8_t>(byte ^ 1u << below(8));
      }
    }
    if (below(8) == 0) file.resize(below(file.size()));
    if (below(16) == 0) {
      const std::span all(file);
      const size_t at = below(all.size() + 1), again = below(all.size() + 1);
      file = joined({all.first(at), all.first(again), all.subspan(at)});
    }
    file.shrink_to_fit();
    const auto start = std::chrono::steady_clock::now();
    const auto size = read_jpeg_size(file);
    sized += size.has_value();
    if (size && rgb_bytes(*size) <= 3 << 20) whole += decoded(file, *size).has_value();
    slowest = std::max(slowest, seconds_since(start));
  }
  std::printf("     %d mutations: %d with a size, %d decoded, at most %.3f s each\n", kMutations, sized, whole, slowest);
  report(sized > kMutations / 4 && whole > kMutations / 20, "mutations get as far as the pixels");
  report(slowest < 5, "no mutation takes long");
}

}  // namespace

int main() {
  test_encodings();
  test_orientations();
  test_other_size();
  test_files();
  test_pipe();
  test_incomplete();
  test_cancelled();
  test_cut_short();
  test_many_scans();
  test_many_segments();
  test_mutations();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
