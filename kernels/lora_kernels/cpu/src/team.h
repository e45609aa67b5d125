// Threads that run the same program and meet at barriers.

#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace multilora {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads that live as long as the model. Work of a phase is taken item by item, so a thread whose core is busy with
// somebody else's work takes fewer; which thread takes an item changes no bit of it.
class Team {
 public:
  explicit Team(int threads) : size_(threads) {
    for (int index = 1; index < threads; ++index) threads_.emplace_back([this, index] { serve(index); });
  }

  ~Team() {
    program_ = nullptr;
    begin();
    for (std::thread& thread : threads_) thread.join();
  }

  int size() const { return size_; }

  // How many of `items` a thread takes at a time where they are short, as to take them costs a line that threads share.
  int share(int items) const { return std::max(1, items / (4 * size_)); }

  // Run program(thread) on every thread, the caller's being thread 0; return when all have ended.
  void run(const std::function<void(int)>& program) {
    program_ = &program;
    begin();
    program(0);
    barrier();
  }

  // A phase: work(item) once for each of `items`, `grain` of them taken at a time. Every thread calls it; all return
  // when the last item is done.
  template <class Work>
  void each(int items, int grain, Work&& work) {
    for (int first; (first = next_.fetch_add(grain, std::memory_order_relaxed)) < items;)
      for (int item = first; item < items && item < first + grain; ++item) work(item);
    barrier();
  }

  // The same an item at a time, each taken while its thread is at the one before: work(item, next), of which there is no
  // next from `items` on, so that memory can be asked for it.
  template <class Work>
  void each_knowing(int items, Work&& work) {
    const auto take = [&] { return next_.fetch_add(1, std::memory_order_relaxed); };
    for (int item = take(), next; item < items; item = next) work(item, next = take());
    barrier();
  }

 private:
  // A phase lasts microseconds, so a waiter spins for about as long; then its core may be wanted by the others of this
  // machine, the very thread it waits for among them, so it yields; between steps it sleeps.
  static constexpr int SPINS = 2000;
  static constexpr int YIELDS = 200;

  void wait_while(std::atomic<uint32_t>& value, uint32_t old) {
    for (int spin = 0; spin < SPINS; ++spin, pause())
      if (value.load(std::memory_order_acquire) != old) return;
    for (int yield = 0; yield < YIELDS; ++yield, std::this_thread::yield())
      if (value.load(std::memory_order_acquire) != old) return;
    value.wait(old, std::memory_order_acquire);
  }

  void begin() {
    begun_.fetch_add(1, std::memory_order_release);
    begun_.notify_all();
  }

  void serve(int index) {
    for (uint32_t seen = 0;; ++seen) {
      wait_while(begun_, seen);
      if (program_ == nullptr) return;
      (*program_)(index);
      barrier();
    }
  }

  void barrier() {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.fetch_add(1, std::memory_order_release);
      phase_.notify_all();
    } else {
      wait_while(phase_, phase);
    }
  }

  const int size_;
  const std::function<void(int)>* program_ = nullptr;
  std::vector<std::thread> threads_;
  // Each on a cache line of its own: one is written while others spin on another.
  alignas(64) std::atomic<uint32_t> begun_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> next_{0};
};

}  // namespace multilora
