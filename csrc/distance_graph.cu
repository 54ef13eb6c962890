// distance_graph on CUDA. Up to TILE_ROWS rows: one launch, each value read once. Longer: the totals of the tiles,
// their joining, and the tiles again.
#include <cmath>

#include "distance_graph.cuh"
#include "stable_cuda.h"

namespace avadclip {
namespace {

// What a block works on, and where the sums that cross tiles lie: [2][B][tiles][E], forwards then backwards.
struct Tile {
  int64_t b, s, channel, first;
  int lanes;
  float *forth, *back;

  __device__ Tile(int64_t B, int64_t E, int64_t tiles, int width, float* sums) {
    const int64_t columns = (E + LANES * width - 1) / (LANES * width);
    const int64_t block = blockIdx.x;
    channel = block % columns * LANES * width;
    s = block / columns % tiles;
    b = block / columns / tiles;
    first = s * TILE_ROWS;
    lanes = int(min(int64_t(LANES), (E - channel) / width));
    forth = sums ? sums + (b * tiles + s) * E + channel : nullptr;
    back = sums ? forth + B * tiles * E : nullptr;
  }
};

template <class T, int WIDTH>
__global__ void __launch_bounds__(TILE_THREADS) totals_kernel(
    const T* values, Lengths lengths, int64_t B, int64_t E, int64_t tiles, Decay a, float* sums) {
  __shared__ Joins<WIDTH> joins;
  __shared__ int64_t partial[WARPS_MAX];
  const Block team{partial};
  const Tile tile(B, E, tiles, WIDTH, sums);
  PerThread<Segment<T, WIDTH>, Block> own(team);
  join_segments<T, WIDTH>(team, own, joins, values + tile.b * lengths.rows * E + tile.channel, E, tile.first,
                          lengths[tile.b], tile.lanes, a, nullptr, nullptr, tile.forth, tile.back);
}

__global__ void __launch_bounds__(TILE_THREADS) join_kernel(
    float* sums, int64_t B, int64_t E, int64_t tiles, Decay a) {
  const int64_t i = int64_t(blockIdx.x) * TILE_THREADS + threadIdx.x;
  if (i >= B * E) return;
  float* forth = sums + i / E * tiles * E + i % E;
  join_tiles(forth, forth + B * tiles * E, tiles, E, a);
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(TILE_THREADS, 1) distance_graph_kernel(
    const T* values, Lengths lengths, int64_t B, int64_t E, int64_t tiles, Decay a, float* sums, T* out) {
  __shared__ Joins<WIDTH> joins;
  __shared__ int64_t partial[WARPS_MAX];
  const Block team{partial};
  const Tile tile(B, E, tiles, WIDTH, sums);
  const int64_t offset = tile.b * lengths.rows * E + tile.channel, n = lengths[tile.b];
  PerThread<Segment<T, WIDTH>, Block> own(team);
  join_segments<T, WIDTH>(team, own, joins, values + offset, E, tile.first, n, tile.lanes, a, tile.forth, tile.back,
                          nullptr, nullptr);
  write_tile<T, WIDTH>(team, own, joins, out + offset, E, tile.first, n, lengths.rows, tile.lanes, a);
}

template <class T, int WIDTH>
void run(const Tensor& x, Tensor& out, Lengths lengths, double scale, cudaStream_t stream) {
  const int64_t B = x.size(0), rows = x.size(1), E = x.size(2);
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, columns = (E + LANES * WIDTH - 1) / (LANES * WIDTH);
  const Decay a{float(std::exp(-1 / scale)), float(std::exp(-SEGMENT / scale)), float(std::exp(-TILE_ROWS / scale))};
  const unsigned grid = blocks(B * tiles * columns);
  std::optional<Tensor> room;
  float* sums = nullptr;
  if (tiles > 1) {
    room = empty(x, {2, B, tiles, E}, ScalarType::Float);
    sums = mutable_data<float>(*room);
    totals_kernel<T, WIDTH><<<grid, TILE_THREADS, 0, stream>>>(data<T>(x), lengths, B, E, tiles, a, sums);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    join_kernel<<<blocks((B * E + TILE_THREADS - 1) / TILE_THREADS), TILE_THREADS, 0, stream>>>(sums, B, E, tiles, a);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  distance_graph_kernel<T, WIDTH>
      <<<grid, TILE_THREADS, 0, stream>>>(data<T>(x), lengths, B, E, tiles, a, sums, mutable_data<T>(out));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor distance_graph(const Tensor& values, double scale, const std::optional<Tensor>& lengths) {
  check_dims("values", values, "[B, T, E]", 3);
  STD_TORCH_CHECK(scale > 0, "scale must be positive, got ", scale);
  const int64_t B = values.size(0), T = values.size(1), E = values.size(2);
  const Tensor x = dense(values);
  const std::optional<Tensor> l = lengths ? std::optional(dense(*lengths)) : std::nullopt;
  const Lengths valid = l ? device_lengths(*l, B, T, values) : Lengths{nullptr, false, T};
  Tensor out = torch::stable::empty_like(x);
  if (out.numel() == 0) return out;
  const Launch launch(values);
  by_cuda_dtype(values.scalar_type(), [&](auto type) {
    using S = decltype(type);
    constexpr int WIDTH = 16 / sizeof(S);
    // Vectors of 16 bytes where every row starts at one.
    if (E % WIDTH == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0)
      run<S, WIDTH>(x, out, valid, scale, launch.stream);
    else
      run<S, 1>(x, out, valid, scale, launch.stream);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avadclip_fast, CUDA, m) {
  m.impl("distance_graph", TORCH_BOX(&distance_graph));
}

}  // namespace avadclip
