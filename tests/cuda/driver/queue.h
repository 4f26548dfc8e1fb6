// The queue of work of the fake GPU: see queue.cpp.
#pragma once

namespace queue {
// Reads ELBO_EMULATED_ASYNC: work runs at once or late.
void configure();
// Runs all queued work.
void finish();
// Runs the next piece of work. False if there is none.
bool advance();
// Work between these calls is recorded: ELBO_EMULATED_PROFILE.
void start_profile();
void stop_profile();
}  // namespace queue
