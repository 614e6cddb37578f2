#include "traffic.h"

#include <algorithm>
#include <bit>

namespace simt {

Traffic::Site& Traffic::site(int warp, uint64_t place_in_code) {
  if (place_in_code != last_place_) {
    last_place_ = place_in_code;
    last_index_ =
        indices_.try_emplace(place_in_code, static_cast<int>(indices_.size())).first->second;
  }
  auto& sites = sites_[warp];
  if (last_index_ >= static_cast<int>(sites.size())) sites.resize(indices_.size());
  return sites[last_index_];
}

void Traffic::add(const Access& now, const Place& place, uintptr_t address, int bytes,
                  AccessKind kind, uint32_t warp_lanes) {
  const bool write = kind != AccessKind::kRead;
  if (kind == AccessKind::kAtomic) ++report_->atomics;
  if (!place.shared) {
    TensorTraffic& tensor = report_->tensors[place.tensor];
    (write ? tensor.bytes_written : tensor.bytes_read) += bytes;
  }

  const int warp = now.thread / kWarpSize, lane = now.thread % kWarpSize;
  // The same code may read a tensor in one lane and shared memory in another: two requests.
  Site& from = site(warp, uint64_t{now.pc} << 1 | place.shared);
  const uint32_t i = from.times[lane]++ - from.first;
  if (i >= from.requests.size()) from.requests.resize(i + 1);
  Request& request = from.requests[i];
  if (!request.lanes) {
    ++from.num_open;
    if (!from.listed) {
      from.listed = true;
      open_sites_[warp].push_back(last_index_);
    }
  }
  request.lanes |= 1u << lane;
  request.bytes = bytes;
  request.write = write;
  request.shared = place.shared;
  request.addresses[lane] = address;
  request.tensors[lane] = static_cast<int16_t>(place.tensor);
  if (request.lanes != warp_lanes) return;

  count(request);
  if (--from.num_open == 0) {  // all lanes are level
    from.first += static_cast<uint32_t>(from.requests.size());
    from.requests.clear();
  } else {
    request.bytes = 0;  // counted
  }
}

void Traffic::flush(int warp) {
  for (const int index : open_sites_[warp]) {
    Site& open = sites_[warp][index];
    for (const Request& request : open.requests)
      if (request.lanes && request.bytes) count(request);
    open.requests.clear();
    open.times.fill(0);
    open.first = 0;
    open.num_open = 0;
    open.listed = false;
  }
  open_sites_[warp].clear();
}

void Traffic::count(const Request& request) {
  if (request.shared) {
    count_shared(request);
  } else {
    count_global(request);
  }
}

void Traffic::count_global(const Request& request) {
  constexpr int kSectorBytes = 32;
  // A request belongs to the tensor of its first lane, each sector to that of its first lane.
  TensorTraffic& first = report_->tensors[request.tensors[std::countr_zero(request.lanes)]];
  ++(request.write ? first.write_requests : first.read_requests);
  std::array<uintptr_t, 2 * kWarpSize> seen;
  int num_seen = 0;
  for (uint32_t rest = request.lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    const uintptr_t address = request.addresses[lane];
    const uintptr_t last = (address + request.bytes - 1) / kSectorBytes;
    for (uintptr_t sector = address / kSectorBytes; sector <= last; ++sector) {
      if (num_seen && seen[num_seen - 1] == sector) continue;
      if (std::find(seen.begin(), seen.begin() + num_seen, sector) != seen.begin() + num_seen)
        continue;
      seen[num_seen++] = sector;
      TensorTraffic& tensor = report_->tensors[request.tensors[lane]];
      ++(request.write ? tensor.sectors_written : tensor.sectors_read);
    }
  }
}

void Traffic::count_shared(const Request& request) {
  ++report_->shared_requests;
  // The 32 banks give 128 bytes at a time: 8 lanes of 16 bytes, 16 of 8, 32 of 4 or less.
  count_phases(request, request.bytes > 8 ? 8 : request.bytes > 4 ? 16 : 32);
}

void Traffic::count_phases(const Request& request, int lanes_per_phase) {
  constexpr int kBanks = 32;
  for (int first = 0; first < kWarpSize; first += lanes_per_phase) {
    std::array<uint8_t, kBanks> num_words{};
    std::array<std::array<uintptr_t, 2 * kWarpSize>, kBanks> words;
    int wavefronts = 0;
    for (int lane = first; lane < first + lanes_per_phase; ++lane) {
      if (!(request.lanes >> lane & 1)) continue;
      const uintptr_t address = request.addresses[lane];
      for (uintptr_t word = address / 4; word <= (address + request.bytes - 1) / 4; ++word) {
        auto& of_bank = words[word % kBanks];
        uint8_t& count = num_words[word % kBanks];
        if (std::find(of_bank.begin(), of_bank.begin() + count, word) != of_bank.begin() + count)
          continue;
        of_bank[count++] = word;
        wavefronts = std::max<int>(wavefronts, count);
      }
    }
    report_->shared_wavefronts += wavefronts;
    report_->shared_conflicts += std::max(0, wavefronts - 1);
  }
}

void Traffic::add_shared_rows(const uintptr_t (&rows)[kWarpSize], int num_rows) {
  constexpr int kRowBytes = 16;
  Request request;
  request.lanes = num_rows == kWarpSize ? ~0u : (1u << num_rows) - 1;
  request.bytes = kRowBytes;
  std::copy(std::begin(rows), std::end(rows), request.addresses.begin());
  count_shared(request);
}

}  // namespace simt
