// Work in parts, on threads that stay: to start one takes longer than many a layer's product.

#pragma once

// Run `call(work, part)` for every part from 0 on, on the caller's thread and on at most `parts - 1` others; returns when all
// are done. Which thread runs a part is open. Calls from several threads at once, and from a forked process, are right.
void run_in_parts(int parts, void (*call)(const void* work, int part), const void* work);

template <class Work> void in_parts(int parts, const Work& work) {
    run_in_parts(parts, [](const void* own, int part) { (*static_cast<const Work*>(own))(part); }, &work);
}
