// A step of many blocks: calls one after the other, each after a header (calls.h).

#include "calls.h"
#include "tiles.h"

#include <cstring>

extern "C" int64_t dsmini_attention(const AttentionCall*, int64_t bytes);
extern "C" int64_t dsmini_grouped_attention(const GroupedAttentionCall*, int64_t bytes);
extern "C" int64_t dsmini_compressed_attention(const CompressedAttentionCall*, int64_t bytes);
extern "C" int64_t dsmini_stream_step(const StreamStepCall*, int64_t bytes);
extern "C" int64_t dsmini_feed_forward(const FeedForwardCall*, int64_t bytes);

extern "C" __attribute__((visibility("default"))) int64_t dsmini_blocks(const char* calls, int64_t bytes) {
  const auto take = [&](auto* to) {
    if (bytes < int64_t(sizeof *to)) return false;
    memcpy(to, calls, sizeof *to);
    calls += sizeof *to, bytes -= sizeof *to;
    return true;
  };
  while (bytes > 0) {
    StepHeader header;
    if (!take(&header)) return BAD_CALL;
    const auto run = [&](auto call, auto function) -> int64_t {
      return header.bytes == sizeof call && take(&call) ? function(&call, sizeof call) : int64_t{BAD_CALL};
    };
    const int64_t error = header.kind == ATTENTION              ? run(AttentionCall(), dsmini_attention)
                          : header.kind == GROUPED_ATTENTION    ? run(GroupedAttentionCall(), dsmini_grouped_attention)
                          : header.kind == FEED_FORWARD         ? run(FeedForwardCall(), dsmini_feed_forward)
                          : header.kind == COMPRESSED_ATTENTION ? run(CompressedAttentionCall(), dsmini_compressed_attention)
                          : header.kind == STREAM_STEP            ? run(StreamStepCall(), dsmini_stream_step)
                                                                : int64_t{BAD_CALL};
    if (error) return error;
  }
  return FINE;
}
