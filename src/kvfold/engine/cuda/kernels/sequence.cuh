// One row of a call of attention, as the host or enter.cu describes it.
#pragma once
// recent_k/v: exact tokens folded..length-1, token folded + e in slot (first + e) % ring of [H][stride / D][D]; pages: addresses of
// ceil(folded / 128) pages; pad: the call's first tokens that are padding. 72 bytes.
struct Sequence { unsigned long long recent_k, recent_v, sink_k, sink_v, pages; int length, folded, pad, first, ring, unused; long long stride; };
