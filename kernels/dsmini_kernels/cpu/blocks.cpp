// A step of many blocks: calls one after the other, each after a header of its function and its bytes (build.py, BLOCKS).

#include "steps.h"
#include "tiles.h"

#include <cstring>

extern "C" int64_t dsmini_attention(const AttentionCall*, int64_t bytes);
extern "C" int64_t dsmini_grouped(const GroupedCall*, int64_t bytes);
extern "C" int64_t dsmini_feed_forward(const FeedForwardCall*, int64_t bytes);

extern "C" __attribute__((visibility("default"))) int64_t dsmini_blocks(const char* calls, int64_t bytes) {
  enum Function : int64_t { ATTENTION, GROUPED, FEED_FORWARD };
  const auto run = [&](auto call, auto entry, int64_t size) -> int64_t {
    if (size != int64_t(sizeof call)) return BAD_CALL;
    memcpy(&call, calls, sizeof call);
    return entry(&call, size);
  };
  while (bytes > 0) {
    int64_t header[2];
    if (bytes < int64_t(sizeof header)) return BAD_CALL;
    memcpy(header, calls, sizeof header);
    calls += sizeof header, bytes -= sizeof header;
    const int64_t size = header[1];
    if (size < 0 || size > bytes) return BAD_CALL;
    const int64_t error = header[0] == ATTENTION      ? run(AttentionCall(), dsmini_attention, size)
                          : header[0] == GROUPED      ? run(GroupedCall(), dsmini_grouped, size)
                          : header[0] == FEED_FORWARD ? run(FeedForwardCall(), dsmini_feed_forward, size)
                                                      : int64_t{BAD_CALL};
    if (error) return error;
    calls += size, bytes -= size;
  }
  return FINE;
}
