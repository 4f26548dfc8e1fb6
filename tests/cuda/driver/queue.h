// Work of the fake GPU that waits for its turn: see queue.cpp.
#pragma once

namespace queue {
// At once, or late: ELBO_EMULATED_ASYNC.
void configure();
// Does all that was asked for.
void finish();
// Does the next piece. False if there is none.
bool advance();
// What lies between is written down: ELBO_EMULATED_PROFILE.
void start_profile();
void stop_profile();
}  // namespace queue
