// How the 3x3 convolutions of dense blocks cut images: into strips of whole rows, or of whole images where these are
// small, whose values are written once into the second-level cache, with a border of zeros around each image's part,
// and then read by tiles of Winograd's F(2x2, 3x3).
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv1x1_values.h"
#include "winograd.h"

namespace resnet_fused::cpu {

using Tile2 = Filtering<2>;  // of 2x2 outputs from 4x4 inputs

// What there is of one strip.
struct Strip {
  int64_t image, images, row, rows, tile_rows, tiles;
};

struct Strips {
  static constexpr int64_t kFloats = int64_t(84) << 10;  // of a strip's values, with their border
  static constexpr int64_t kTiles = 28, kFew = 42;       // of a group, at most; that images are put together for

  int64_t N, H, W, tile_columns;
  int64_t rows, images, per_image, count;  // of a strip, at most; strips of an image, and of all

  // `pitch`: floats between pixels of a strip.
  Strips(int64_t n, int64_t h, int64_t w, int64_t pitch) : N(n), H(h), W(w), tile_columns((w + 1) / 2) {
    const int64_t most = std::max(kFloats / (pitch * width()) - 2, int64_t(2)) / 2 * 2;
    per_image = (H + most - 1) / most;
    rows = per_image == 1 ? H : ((H + per_image - 1) / per_image + 1) / 2 * 2;
    per_image = (H + rows - 1) / rows;
    const int64_t tiles = (H + 1) / 2 * tile_columns;
    const int64_t fit = std::min(kFew / tiles, kFloats / (pitch * width() * (rows + 3)));
    images = per_image == 1 ? std::max(fit, int64_t(1)) : 1;
    count = per_image == 1 ? (N + images - 1) / images : N * per_image;
  }

  int64_t width() const { return 2 * tile_columns + 2; }
  int64_t height() const { return (rows + 1) / 2 * 2 + 2; }
  int64_t pixels() const { return images * height() * width(); }  // with the border
  int64_t outputs() const { return images * rows * W; }
  int64_t tiles() const { return N * ((H + 1) / 2) * tile_columns; }
  int64_t groups(const Strip& strip) const { return (strip.tiles + kTiles - 1) / kTiles; }

  Strip at(int64_t index) const {
    Strip s{};
    s.image = per_image == 1 ? index * images : index / per_image;
    s.images = std::min(images, N - s.image);
    s.row = per_image == 1 ? 0 : index % per_image * rows;
    s.rows = std::min(rows, H - s.row);
    s.tile_rows = (s.rows + 1) / 2;
    s.tiles = s.images * s.tile_rows * tile_columns;
    return s;
  }
  // The pixel of all images that is the strip's first, and how many there are: they lie side by side.
  int64_t first_pixel(const Strip& s) const { return (s.image * H + s.row) * W; }
  int64_t pixels_of(const Strip& s) const { return s.images * s.rows * W; }

  // `width` channels of its pixels that the strip before has not read; none beyond the last strip, of `end`.
  RESNET_FUSED_INLINE RowLines lines(int64_t index, int64_t end, const float* first, int64_t width,
                                     int64_t pitch) const {
    if (index >= end) return {first, 0};
    const Strip s = at(index);
    const int64_t begin = first_pixel(s) + (s.row > 0 ? W : 0), stop = first_pixel(s) + pixels_of(s);
    return {first + begin * pitch, stop - begin + (s.row + s.rows < H ? W : 0), width, pitch};
  }
  // How often products of a strip's tiles begin with other rows, at this level, for one panel.
  template <class L>
  RESNET_FUSED_INLINE int64_t products(const Strip& s) const {
    const int64_t parts = groups(s), tiles = (s.tiles + parts - 1) / parts;
    return parts * Tile2::values * ((tiles + L::rows - 1) / L::rows);
  }
};

// A tile of a strip: which image of the strip, and its first output there.
struct StripTile {
  int64_t image, row, column;

  RESNET_FUSED_INLINE StripTile(const Strips& p, const Strip& s, int64_t tile)
      : image(tile / (s.tile_rows * p.tile_columns)),
        row(tile / p.tile_columns % s.tile_rows * 2),
        column(tile % p.tile_columns * 2) {}

  RESNET_FUSED_INLINE void advance(const Strips& p, const Strip& s) {
    column += 2;
    if (column >= p.W) column = 0, row += 2;
    if (row >= s.rows) row = 0, ++image;
  }
  // Its 4x4 inputs begin here, in pixels of the strip with its border.
  RESNET_FUSED_INLINE int64_t patch(const Strips& p) const { return (image * p.height() + row) * p.width() + column; }
  // Of the strip's outputs, without a border.
  RESNET_FUSED_INLINE int64_t output(const Strips& p, const Strip& s) const {
    return (image * s.rows + row) * p.W + column;
  }
};

// Fills a strip: write(out, pixel, count) writes `count` pixels of the images from `pixel` on, all else becomes zeros.
template <class Write>
RESNET_FUSED_INLINE void write_strip(const Strips& p, const Strip& s, float* out, int64_t pitch, const Write& write) {
  const int64_t line = p.width() * pitch, lines = 2 * s.tile_rows + 2;
  for (int64_t image = 0; image < s.images; ++image) {
    float* to = out + image * p.height() * line;
    for (int64_t y = 0; y < lines; ++y, to += line) {
      const int64_t row = s.row + y - 1;
      if (row < 0 || row >= p.H) {
        std::memset(to, 0, line * sizeof(float));
        continue;
      }
      std::memset(to, 0, pitch * sizeof(float));
      write(to + pitch, ((s.image + image) * p.H + row) * p.W, p.W);
      std::memset(to + (p.W + 1) * pitch, 0, (p.width() - p.W - 1) * pitch * sizeof(float));
    }
  }
}

// v[value][tile][pitch] = the transforms of the inputs of `count` tiles; `channels` is of whole vectors.
template <class L>
RESNET_FUSED_INLINE void transform_strip(const Strips& p, const Strip& s, int64_t first, int64_t count,
                                         const float* strip, int64_t pitch, int64_t channels, float* v) {
  const int64_t line = p.width() * pitch;
  StripTile tile(p, s, first);
  for (int64_t t = 0; t < count; ++t, tile.advance(p, s)) {
    const float* from = strip + tile.patch(p) * pitch;
    const float* pixels[4][4];
    for (int64_t i = 0; i < 16; ++i) pixels[i / 4][i % 4] = from + i / 4 * line + i % 4 * pitch;
    transform_input<L, Tile2>(v + t * pitch, count * pitch, pixels, channels, 2 * pitch);
  }
}

}  // namespace resnet_fused::cpu
