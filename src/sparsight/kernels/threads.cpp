// A team of threads. A run is announced by its ticket: number of the run, parts, and the next part that nobody has taken. Who
// takes a part has found the ticket of that run unchanged, so the run is not over, and its work is still there.
//
// A thread without work looks for some for a short while, so that the layers of a model find it awake; then it sleeps.

#include "threads.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace {

constexpr int LOOKS = 4000;      // before a thread sleeps: some 50 microseconds
constexpr int MOST_PARTS = 1 << 15;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

struct Ticket {
    uint64_t run, parts, next;
    static Ticket of(uint64_t bits) { return {bits >> 32, bits >> 16 & 0xffff, bits & 0xffff}; }
    uint64_t bits() const { return run << 32 | parts << 16 | next; }
    bool open() const { return next < parts; }
};

class Team {
  public:
    const pid_t process = getpid();
    std::mutex in_use;  // one run at a time

    void run(int parts, void (*call)(const void*, int), const void* work) {
        for (; others_ < parts - 1; others_++) std::thread([this] { serve(); }).detach();
        call_ = call;
        work_ = work;
        left_.store(parts, std::memory_order_relaxed);
        const uint64_t last = Ticket::of(ticket_.load(std::memory_order_relaxed)).run;
        ticket_.store(Ticket{(last + 1) & 0xffffffff, uint64_t(parts), 0}.bits());
        if (asleep_.load()) {
            { std::lock_guard<std::mutex> hold(door_); }
            bell_.notify_all();
        }
        take_parts();
        for (int looks = 0; left_.load(std::memory_order_acquire); looks++) looks < LOOKS ? pause() : std::this_thread::yield();
    }

  private:
    std::atomic<uint64_t> ticket_{0};
    std::atomic<int> left_{0}, asleep_{0};
    void (*call_)(const void*, int) = nullptr;
    const void* work_ = nullptr;
    int others_ = 0;
    std::mutex door_;
    std::condition_variable bell_;

    bool open() const { return Ticket::of(ticket_.load()).open(); }

    void take_parts() {
        for (uint64_t bits = ticket_.load(); Ticket::of(bits).open();)
            if (ticket_.compare_exchange_weak(bits, bits + 1)) {
                call_(work_, int(Ticket::of(bits).next));
                left_.fetch_sub(1, std::memory_order_acq_rel);
                bits = ticket_.load();
            }
    }

    void serve() {
        while (true) {
            for (int looks = 0; looks < LOOKS && !open(); looks++) pause();
            if (!open()) {
                std::unique_lock<std::mutex> hold(door_);
                asleep_++;
                bell_.wait(hold, [this] { return open(); });
                asleep_--;
            }
            take_parts();
        }
    }
};

// The team of this process. It is never destroyed, since its threads run until the process ends; a forked process has none
// of its parent's threads and makes its own.
Team& team() {
    static std::atomic<Team*> known{nullptr};
    Team* now = known.load();
    while (!now || now->process != getpid()) {
        Team* const made = new Team;
        if (known.compare_exchange_strong(now, made)) return *made;
        delete made;
    }
    return *now;
}

}  // namespace

void run_in_parts(int parts, void (*call)(const void*, int), const void* work) {
    if (parts > 1 && parts < MOST_PARTS) {
        Team& own = team();
        if (std::unique_lock<std::mutex> use(own.in_use, std::try_to_lock); use) return own.run(parts, call, work);
    }
    for (int part = 0; part < parts; part++) call(work, part);  // others use the team: as many calls as threads already run
}
