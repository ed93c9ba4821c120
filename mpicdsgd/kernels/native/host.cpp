// The binding: checks every argument, then shares the elements out over the threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cfenv>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(MPICDSGD_AVX2)
#include <cpuid.h>
#endif

#include "kernel.h"

namespace nb = nanobind;
using namespace mpicdsgd;

namespace {

constexpr std::int64_t LEAST_PER_THREAD = 1 << 15;   // elements; below, starting threads costs more
constexpr double NONE = std::numeric_limits<double>::quiet_NaN();   // of a sum not asked for
constexpr std::int64_t STREAM_FROM = std::int64_t(16) << 20;   // bytes of p

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

// A one-dimensional contiguous array of the caller's, held until the pass is over.
class Array {
 public:
  Array(nb::handle object, const std::string& name, const char* format, bool writable) {
    const int flags = PyBUF_FORMAT | PyBUF_ND | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
      PyErr_Clear();
      refuse(name + ": a contiguous" + (writable ? " writable" : "") + " array is needed");
    }
    const std::string given = view_.format ? view_.format : "B";
    if (view_.ndim != 1 || given != format) {
      const std::string got = std::to_string(view_.ndim) + "-D with format '" + given + "'";
      PyBuffer_Release(&view_);
      refuse(name + ": a 1-D array with format '" + format + "' is needed, got " + got);
    }
    if (address() % std::uintptr_t(std::min<Py_ssize_t>(view_.itemsize, 8)) != 0) {
      PyBuffer_Release(&view_);
      refuse(name + ": the array is not aligned to its elements");
    }
  }
  Array(Array&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { if (view_.obj) PyBuffer_Release(&view_); }

  std::int64_t size() const { return view_.len / view_.itemsize; }
  std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(view_.buf); }
  std::uintptr_t end() const { return address() + std::uintptr_t(view_.len); }
  template <class T> T* data() const { return static_cast<T*>(view_.buf); }

 private:
  Py_buffer view_;
};

struct Named {
  std::string name;
  Array array;
};

const Array* array_if_given(std::vector<Named>& kept, nb::handle object, const std::string& name,
                            const char* format, bool writable, std::int64_t size) {
  if (object.is_none()) return nullptr;
  kept.push_back({name, Array(object, name, format, writable)});
  const std::int64_t got = kept.back().array.size();
  if (size >= 0 && got != size)
    refuse(name + ": has " + std::to_string(got) + " elements, z has " + std::to_string(size));
  return &kept.back().array;
}

// The loop reads all of a pack before it writes any of it: the same memory is safe, a shift is not.
void refuse_overlaps(const std::vector<Named>& written, const std::vector<Named>& read) {
  const auto apart = [](const Array& a, const Array& b) {
    return a.end() <= b.address() || b.end() <= a.address();
  };
  for (std::size_t i = 0; i < written.size(); ++i) {
    const Array& a = written[i].array;
    for (std::size_t j = 0; j < i; ++j)
      if (!apart(a, written[j].array))
        refuse(written[j].name + " and " + written[i].name + ": both are written, and overlap");
    for (const Named& b : read) {
      const bool same = a.address() == b.array.address() && a.end() == b.array.end();
      if (!same && !apart(a, b.array))
        refuse(written[i].name + " and " + b.name + ": overlap without being the same array");
    }
  }
}

// The number of elements in all segments.
std::int64_t check_segments(const Segment* segments, std::int64_t count, std::int64_t size,
                            bool has_q) {
  std::int64_t total = 0;
  std::vector<std::pair<std::int64_t, std::int64_t>> runs;
  runs.reserve(std::size_t(count));
  for (std::int64_t i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    const auto bad = [&](const std::string& what) {
      refuse("segments[" + std::to_string(i) + "]: " + what);
    };
    if (s.length < 0 || s.length > size || s.offset < 0 || s.offset > size - s.length)
      bad("offset " + std::to_string(s.offset) + " and length " + std::to_string(s.length) +
          " leave the " + std::to_string(size) + " elements of z");
    if (s.own != 0 && s.own != 1) bad("own must be 0 or 1, got " + std::to_string(s.own));
    if (s.own && !has_q) bad("own = 1 needs q");
    if (s.grad % sizeof(float) != 0) bad("the gradient's address is not aligned to 4 bytes");
    if (s.length > 0) runs.emplace_back(s.offset, s.length);
    total += s.length;
    if (total > size) refuse("segments: overlap");
  }
  if (!std::is_sorted(runs.begin(), runs.end())) std::sort(runs.begin(), runs.end());
  for (std::size_t i = 1; i < runs.size(); ++i)
    if (runs[i - 1].first + runs[i - 1].second > runs[i].first) refuse("segments: overlap");
  return total;
}

// What a pass does with its segments; those below `measured` count in the sums.
struct Plan {
  const Isa& isa;
  Sweep sweep, measuring;
  std::int64_t measured;
};

// Runs elements [first, last) of the segments laid end to end; starts[i] is where segment i begins.
bool run_share(const Pass& pass, const Segment* segments, const std::vector<std::int64_t>& starts,
               const Plan& plan, std::int64_t first, std::int64_t last, Sums& result) {
  // The caller may flush subnormals (torch.set_flush_denormal); the result may not depend on it.
  std::fenv_t callers;
  std::fegetenv(&callers);
  std::fesetenv(FE_DFL_ENV);
  bool finite = true;
  Sums sums{};   // its own: threads that write side by side would slow each other
  auto at = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1;
  for (; first < last; ++at) {
    const Segment& s = segments[at];
    const std::int64_t until = std::min(last, starts[std::size_t(at) + 1]);
    const std::int64_t shift = s.offset - starts[std::size_t(at)];
    const Sweep sweep = at < plan.measured ? plan.measuring : plan.sweep;
    if (first < until) finite &= sweep(pass, s, first + shift, until + shift, sums);
    first = std::max(first, until);
  }
  if (pass.stream) plan.isa.fence();
  std::fesetenv(&callers);
  result = sums;
  return finite;
}

bool run(const Pass& pass, const Segment* segments, const std::vector<std::int64_t>& starts,
         const Plan& plan, int threads, Sums& sums) {
  const std::int64_t total = starts.back();
  std::int64_t shares = std::min<std::int64_t>(threads, total / LEAST_PER_THREAD);
#if defined(_OPENMP)
  shares = std::min<std::int64_t>(shares, omp_get_num_procs());
#else
  shares = 1;
#endif
  if (shares <= 1) return run_share(pass, segments, starts, plan, 0, total, sums);
  // Shares end at multiples of 64 elements: in an arena, at the ends of cache lines.
  const auto bound = [&](std::int64_t share) {
    return share == shares ? total : (total / shares * share) & ~std::int64_t(63);
  };
  bool finite = true;
  std::vector<Sums> parts(std::size_t(shares), Sums{});   // added up in order: always the same bits
#if defined(_OPENMP)
#pragma omp parallel for num_threads(int(shares)) schedule(static, 1) reduction(&& : finite)
#endif
  for (std::int64_t share = 0; share < shares; ++share)
    finite = run_share(pass, segments, starts, plan, bound(share), bound(share + 1),
                       parts[std::size_t(share)]) && finite;
  for (const Sums& part : parts)
    for (double Sums::*sum : SUMS) sums.*sum += part.*sum;
  return finite;
}

const Isa& best_isa() {
#if defined(MPICDSGD_AVX2)
  unsigned a = 0, b = 0, c = 0, d = 0;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C))
    return avx2;
#endif
  return generic;
}

const Isa& isa_by_name(const std::string& name) {
  const Isa& best = best_isa();
  if (name.empty() || name == best.name) return best;
  if (name == generic.name) return generic;
  refuse("isa: '" + name + "' is not to be had here, use 'generic' or '" + best.name + "'");
}

nb::tuple update(
    nb::handle out, nb::handle z, nb::handle at, nb::handle v, nb::handle y, nb::handle p,
    nb::handle q, nb::sequence neighbours, nb::handle weights, nb::handle segments,
    const std::string& wire, int threads, int measure, const std::string& isa_name, int stream) {
  int wire_code = FLOAT32;
  if (wire == "bfloat16") wire_code = BFLOAT16;
  else if (wire == "float16") wire_code = FLOAT16;
  else if (wire != "float32") refuse("wire: float32, bfloat16 or float16, got '" + wire + "'");
  if (threads < 1) refuse("threads: at least 1, got " + std::to_string(threads));
  const Isa& isa = isa_by_name(isa_name);
  const char* stored = wire_code == FLOAT32 ? "f" : "H";
  for (const auto& [object, name] : {std::pair{out, "out"}, std::pair{z, "z"}, std::pair{at, "at"}})
    if (object.is_none()) refuse(std::string(name) + ": a 1-D float32 array is needed, got None");

  std::vector<Named> read, written;
  read.reserve(3 + nb::len(neighbours));
  written.reserve(4);
  Pass pass{};
  const Array* array = array_if_given(read, z, "z", "f", false, -1);
  const std::int64_t size = array->size();
  pass.z = array->data<const float>();
  pass.at = array_if_given(read, at, "at", "f", false, size)->data<const float>();
  pass.out = array_if_given(written, out, "out", "f", true, size)->data<float>();
  if ((array = array_if_given(written, v, "v", "f", true, size))) pass.v = array->data<float>();
  if ((array = array_if_given(written, y, "y", "f", true, size))) pass.y = array->data<float>();
  if ((array = array_if_given(written, p, "p", stored, true, size))) {
    pass.p = array->data<void>();
    const auto bytes = std::int64_t(array->end() - array->address());
    pass.stream = stream < 0 ? bytes >= STREAM_FROM : stream > 0;
  }
  if ((array = array_if_given(read, q, "q", stored, false, size))) {
    pass.q = array->data<const void>();
    pass.stream = pass.stream && pass.q != pass.p;
  }
  std::vector<const void*> near;
  for (nb::handle one : neighbours) {
    const std::string name = "neighbours[" + std::to_string(near.size()) + "]";
    if (one.is_none()) refuse(name + ": an array is needed, got None");
    near.push_back(array_if_given(read, one, name, stored, false, size)->data<const void>());
  }
  const Array weight(weights, "weights", "f", false);
  if (weight.size() != std::int64_t(near.size()))
    refuse("weights: has " + std::to_string(weight.size()) + " elements for " +
           std::to_string(near.size()) + " neighbours");
  pass.neighbours = near.data();
  pass.weights = weight.data<const float>();
  pass.degree = int(near.size());
  refuse_overlaps(written, read);

  const Array table(segments, "segments",
                    "T{l:offset:l:length:L:grad:f:alpha:f:decay:f:mu:f:c_v:f:c_g:i:own:}", false);
  const Segment* first = table.data<const Segment>();
  check_segments(first, table.size(), size, pass.q != nullptr);
  std::vector<std::int64_t> starts{0};
  for (std::int64_t i = 0; i < table.size(); ++i) starts.push_back(starts.back() + first[i].length);

  if (measure < 0 || measure > table.size())
    refuse("measure: 0 to the " + std::to_string(table.size()) + " segments, got " +
           std::to_string(measure));
  const Plan plan{isa, isa.sweep(wire_code, pass.degree, false),
                  isa.sweep(wire_code, pass.degree, true), measure};

  Sums sums{};
  bool finite;
  {
    nb::gil_scoped_release released;
    finite = run(pass, first, starts, plan, threads, sums);
  }
  const auto said = [&](double sum) { return measure ? sum : NONE; };
  return nb::make_tuple(finite, said(sums.apart), said(sums.gradient), said(sums.moved),
                        said(sums.penalty));
}

}  // namespace

NB_MODULE(_native, m) {
  m.attr("isa") = best_isa().name;
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  // None passes here where an array is needed: the checks above name it, in a ValueError.
  m.def("update", &update, nb::arg("out").none(), nb::arg("z").none(), nb::kw_only(),
        nb::arg("at").none(), nb::arg("v").none(), nb::arg("y").none(), nb::arg("p").none(),
        nb::arg("q").none(), nb::arg("neighbours"), nb::arg("weights").none(),
        nb::arg("segments").none(), nb::arg("wire"), nb::arg("threads"), nb::arg("measure") = 0,
        nb::arg("isa") = "", nb::arg("stream") = -1,
        "The fused update; see mpicdsgd.kernels.native.update. Raises ValueError.");
}
