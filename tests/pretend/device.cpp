// A device whose memory is the host's and whose kernels are the CPU's, which refuses what a GPU
// would refuse: tensors of two devices in one operation, a generator of another device, a wait for
// the device where none may be, and float64 where there is none. See README.md.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <unordered_set>

using at::Generator;
using at::Tensor;
using Names = std::unordered_set<std::string>;

namespace {

struct {
  c10::DeviceType type = c10::DeviceType::CUDA;
  Names host_scalars;  // operations that take tensors of no dimension from the host, as numbers
  Names waits;         // operations whose result, or its shape, the host has to read
} device;

enum Debug { kDefault, kWarn, kError };
std::atomic<int> sync_debug{kDefault};
std::atomic<bool> nobody_else{false};  // a capture of the mode "global" is under way
thread_local bool capturing = false;   // this thread's operations go to a graph
thread_local bool own_kernel = false;  // what a kernel does on the host is no wait

c10::Device here() { return {device.type, 0}; }
bool is_here(const Tensor& t) { return t.defined() && t.device().type() == device.type; }
c10::DispatchKeySet keys() {
  return c10::DispatchKeySet(
      device.type == c10::DeviceType::CUDA ? c10::DispatchKey::CUDA : c10::DispatchKey::MPS);
}

void waits(const std::string& what) {
  if (own_kernel) return;
  TORCH_CHECK(!capturing, "CUDA error: operation not permitted when stream is capturing (", what, ")");
  TORCH_CHECK(sync_debug != kError, "called a synchronizing CUDA operation (", what, ")");
  if (sync_debug == kWarn) TORCH_WARN("called a synchronizing CUDA operation (", what, ")");
}

// Memory

std::atomic<int64_t> allocated{0}, peak{0};

struct DeviceMemory final : c10::Allocator {
  static constexpr size_t kHead = 64;  // before each block lies its size
  static void release(void* block) {
    if (block == nullptr) return;
    void* start = static_cast<char*>(block) - kHead;
    allocated -= *static_cast<int64_t*>(start);
    std::free(start);
  }
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, nullptr, &release, here()};
    void* start = std::malloc(size + kHead);
    TORCH_CHECK(start != nullptr, "out of memory");
    *static_cast<int64_t*>(start) = static_cast<int64_t>(size);
    const int64_t now = allocated += static_cast<int64_t>(size);
    for (int64_t most = peak; now > most && !peak.compare_exchange_weak(most, now);) {
    }
    void* block = static_cast<char*>(start) + kHead;
    return {block, block, &release, here()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
} device_memory;

struct PinnedMemory final : c10::Allocator {
  static std::mutex& lock() {
    static std::mutex it;
    return it;
  }
  static std::map<uintptr_t, size_t>& blocks() {
    static auto* all = new std::map<uintptr_t, size_t>;
    return *all;
  }
  static void release(void* block) {
    std::lock_guard<std::mutex> guard(lock());
    blocks().erase(reinterpret_cast<uintptr_t>(block));
    std::free(block);
  }
  static bool holds(const void* pointer) {
    std::lock_guard<std::mutex> guard(lock());
    const auto at = reinterpret_cast<uintptr_t>(pointer);
    auto after = blocks().upper_bound(at);
    return after != blocks().begin() && at < std::prev(after)->first + std::prev(after)->second;
  }
  c10::DataPtr allocate(size_t size) override {
    TORCH_CHECK(!nobody_else && !capturing,
                "CUDA error: operation would make the legacy stream depend on a capturing blocking "
                "stream (pinning memory during a capture)");
    void* block = std::malloc(size ? size : 1);
    std::lock_guard<std::mutex> guard(lock());
    blocks()[reinterpret_cast<uintptr_t>(block)] = size ? size : 1;
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
} pinned_memory;

// Random numbers: a stream of its own, so that what draws from the CPU's is seen; or the CPU's, so
// that results can be compared

std::atomic<bool> draws_as_cpu{false};

struct Draws {
  Generator cpu;
  uint64_t seed = 0;
  bool in_graph = false;
};

struct DeviceGenerator final : c10::GeneratorImpl {
  std::shared_ptr<Draws> draws;

  explicit DeviceGenerator(std::shared_ptr<Draws> from)
      : c10::GeneratorImpl(here(), keys()), draws(std::move(from)) {}
  DeviceGenerator()
      : DeviceGenerator(std::make_shared<Draws>(Draws{at::make_generator<at::CPUGeneratorImpl>()})) {
    set_current_seed(c10::default_rng_seed_val);
  }
  static DeviceGenerator& of(const Generator& g) {
    return *static_cast<DeviceGenerator*>(g.unsafeGetGeneratorImpl());
  }
  void set_current_seed(uint64_t seed) override {
    TORCH_CHECK(!capturing, "CUDAGeneratorImpl::set_current_seed cannot be called during capture");
    draws->seed = seed;
    draws->cpu.set_current_seed(draws_as_cpu ? seed : seed ^ 0x9E3779B97F4A7C15ULL);
  }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return draws->seed; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return draws->seed;
  }
  // The state is the CPU generator's, and then the seed.
  void set_state(const c10::TensorImpl& state) override {
    const size_t size = state.numel() - sizeof(uint64_t);
    const auto* from = static_cast<const char*>(state.data());
    Tensor inner = at::empty({static_cast<int64_t>(size)}, at::kByte);
    std::memcpy(inner.mutable_data_ptr(), from, size);
    draws->cpu.unsafeGetGeneratorImpl()->set_state(*inner.unsafeGetTensorImpl());
    std::memcpy(&draws->seed, from + size, sizeof(uint64_t));
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    Tensor inner(draws->cpu.unsafeGetGeneratorImpl()->get_state());
    const size_t size = inner.numel();
    Tensor state = at::empty({static_cast<int64_t>(size + sizeof(uint64_t))}, at::kByte);
    auto* to = static_cast<char*>(state.mutable_data_ptr());
    std::memcpy(to, inner.const_data_ptr(), size);
    std::memcpy(to + size, &draws->seed, sizeof(uint64_t));
    return state.getIntrusivePtr();
  }
  void graphsafe_set_state(const c10::intrusive_ptr<c10::GeneratorImpl>& other) override {
    draws = static_cast<DeviceGenerator*>(other.get())->draws;
  }
  c10::intrusive_ptr<c10::GeneratorImpl> graphsafe_get_state() const override {
    return c10::make_intrusive<DeviceGenerator>(draws);
  }
  DeviceGenerator* clone_impl() const override {
    return new DeviceGenerator(
        std::make_shared<Draws>(Draws{draws->cpu.clone(), draws->seed, draws->in_graph}));
  }
};

Generator& default_generator() {
  static auto* it = new Generator(at::make_generator<DeviceGenerator>());
  return *it;
}

Generator cpu_generator(const c10::IValue& given, const std::string& name) {
  const Generator g = given.isNone() ? default_generator() : given.toGenerator();
  const auto wanted = c10::DeviceTypeName(device.type, true);
  TORCH_CHECK(g.device().type() == device.type, "Expected a '", wanted,
              "' device type for generator but found '", g.device().type(), "' [", name, "]");
  const Draws& draws = *DeviceGenerator::of(g).draws;
  TORCH_CHECK(!capturing || draws.in_graph,
              "Attempt to increase offset for a CUDA generator not in capture mode.");
  TORCH_CHECK(capturing || !draws.in_graph,
              "Offset increment outside graph capture encountered unexpectedly.");
  return draws.cpu;
}

// Tensors: made here, seen as the host's, copied, viewed

c10::ScalarType supported(std::optional<c10::ScalarType> asked) {
  const auto type = asked.value_or(c10::get_default_dtype_as_scalartype());
  const bool wide = type == at::kDouble || type == at::kComplexDouble;
  TORCH_CHECK_TYPE(device.type != c10::DeviceType::MPS || !wide,
                   "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't "
                   "support float64. Please use float32 instead.");
  return type;
}

Tensor empty(at::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<c10::Device>, std::optional<bool>,
             std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &device_memory, keys(), supported(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                     std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &device_memory, keys(), supported(dtype));
}

Tensor as_host(const Tensor& t) {  // the same memory
  if (!is_here(t)) return t;
  const auto options = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  void* data = t.numel() ? t.unsafeGetTensorImpl()->mutable_data() : nullptr;
  Tensor host = at::from_blob(data, t.sizes(), t.strides(), options);
  host._set_conj(t.is_conj());
  host._set_neg(t.is_neg());
  return host;
}

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (self.device() != from.device()) {
    const Tensor& host = is_here(self) ? from : self;
    const bool pinned = PinnedMemory::holds(host.const_data_ptr());
    if (!non_blocking || (capturing && !pinned)) waits("a copy between host and device");
  }
  Tensor to = as_host(self);
  to.copy_(as_host(from));
  return self;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  as_host(to).copy_(as_host(from));
  return to;
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<c10::MemoryFormat>) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt);
  return self;
}

Tensor& set_whole(Tensor& self, at::Storage from) {
  const auto count = static_cast<int64_t>(from.nbytes() / self.dtype().itemsize());
  return at::native::set_storage_cpu_(self, from, 0, {count}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& from) {
  return at::native::set_storage_cpu_(
      self, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}

// Every other operation: checked as the device would, then run by the CPU's kernel

const Names takes_any_device = {
    "aten::index.Tensor", "aten::index.Tensor_out",   "aten::_unsafe_index.Tensor",
    "aten::index_put_",   "aten::_index_put_impl_",   "aten::index_put",
};

struct Seen {
  bool device = false;
  bool host = false;         // a tensor of the host with dimensions
  bool host_scalar = false;  // ... of none
  bool mask = false;         // an index of truth values, or one from the host, which is copied

  void look(const Tensor& t) {
    if (!t.defined()) return;
    if (is_here(t)) device = true;
    else (t.dim() ? host : host_scalar) = true;
    mask = mask || t.scalar_type() == at::kBool || t.scalar_type() == at::kByte || !is_here(t);
  }
};

Seen look_at(const c10::FunctionSchema& schema, torch::jit::Stack& stack, const std::string& name) {
  Seen seen;
  bool host_written = false;
  const auto& arguments = schema.arguments();
  const size_t first = stack.size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& v = stack[first + i];
    const auto* alias = arguments[i].alias_info();
    if (v.isTensor()) {
      const Tensor& t = v.toTensor();
      seen.look(t);
      host_written = host_written || (alias && alias->isWrite() && t.defined() && !is_here(t));
    } else if (v.isList()) {
      for (const c10::IValue& e : v.toListRef())
        if (e.isTensor()) seen.look(e.toTensor());
    } else if (v.isDevice()) {
      seen.device = seen.device || v.toDevice().type() == device.type;
    }
    if (arguments[i].name() == "generator") v = cpu_generator(v, name);
  }
  seen.host = seen.host || host_written;
  return seen;
}

bool is_mask(const c10::IValue& indices) {
  Seen seen;
  for (const c10::IValue& e : indices.toListRef())
    if (e.isTensor()) seen.look(e.toTensor());
  return seen.mask;
}

void check_fused_rate(const std::string& name, const c10::FunctionSchema& schema,
                      const torch::jit::Stack& stack) {
  if (name.find("aten::_fused_") != 0 || schema.overload_name() != "tensor_lr") return;
  const size_t first = stack.size() - schema.arguments().size();
  const Tensor& rate = stack[first + *schema.argumentIndexWithName("lr")].toTensor();
  TORCH_CHECK(rate.scalar_type() == at::kFloat, "expected scalar type Float but found ",
              rate.scalar_type());
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  std::string name = schema.name();
  if (!schema.overload_name().empty()) name += "." + schema.overload_name();
  const bool any = takes_any_device.count(name);
  if (any ? is_mask((*stack)[stack->size() - schema.arguments().size() + 1])
          : device.waits.count(name) > 0)
    waits(name);
  const Seen seen = look_at(schema, *stack, name);
  const bool mixed = seen.host || (seen.host_scalar && !device.host_scalars.count(name));
  TORCH_CHECK(any || !seen.device || !mixed,
              "Expected all tensors to be on the same device, but found at least two devices, ",
              here(), " and cpu! (", name, ")");
  check_fused_rate(name, schema, *stack);
  const bool before = own_kernel;
  own_kernel = true;
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    own_kernel = before;
    throw;
  }
  own_kernel = before;
}

// What torch asks of a device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, here()); }
  void known(c10::Device d) const { TORCH_CHECK(d.index() <= 0, "CUDA error: invalid device ordinal"); }
  c10::DeviceType type() const override { return device.type; }
  c10::Device exchangeDevice(c10::Device d) const override {
    known(d);
    return here();
  }
  c10::Device getDevice() const override { return here(); }
  void setDevice(c10::Device d) const override { known(d); }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

template <class Interface>
struct Hooks : Interface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<DeviceGenerator>();
  }
  bool isPinnedPtr(const void* pointer) const override { return PinnedMemory::holds(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
};

struct CUDA final : Hooks<at::CUDAHooksInterface> {
  bool hasCUDA() const override { return true; }
  int getNumGPUs() const override { return 1; }
};

struct MPS final : Hooks<at::MPSHooksInterface> {
  bool hasMPS() const override { return true; }
  bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }
};

void implement(torch::Library& aten) {
  aten.impl("empty.memory_format", &empty);
  aten.impl("empty_strided", &empty_strided);
  aten.impl("copy_", &copy_);
  aten.impl("_copy_from_and_resize", &copy_from_and_resize);
  aten.impl("resize_", &resize_);
  aten.impl("set_.source_Storage", &set_whole);
  aten.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  aten.impl("set_.source_Tensor", &set_tensor);
  aten.impl("as_strided", &at::native::as_strided_tensorimpl);
  aten.impl("view", &at::native::view);
  aten.impl("_reshape_alias", &at::native::_reshape_alias);
  aten.impl("unfold", &at::native::unfold);
  aten.impl("view_as_real", &at::native::view_as_real);
  aten.impl("view_as_complex", &at::native::view_as_complex);
  // These would choose among the libraries of a device.
  for (const char* name : {"convolution", "convolution_backward"})
    aten.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
}

Names lines(const char* text) {
  Names found;
  std::istringstream from(text);
  for (std::string line; std::getline(from, line);) found.insert(line);
  return found;
}

Tensor pin(const Tensor& t) {
  TORCH_CHECK(t.device().is_cpu(), "cannot pin '", t.toString(),
              "' only dense CPU tensors can be pinned");
  Tensor pinned = at::detail::empty_strided_generic(
      t.sizes(), t.strides(), &pinned_memory, c10::DispatchKeySet(c10::DispatchKey::CPU),
      t.scalar_type());
  return pinned.copy_(t);
}

bool is_pinned(const Tensor& t) {
  return t.device().is_cpu() && PinnedMemory::holds(t.const_data_ptr());
}

Generator the_generator() { return default_generator(); }
bool in_graph(const Generator& g) { return DeviceGenerator::of(g).draws->in_graph; }
void draw_as_cpu(bool on) { draws_as_cpu = on; }
void put_in_graph(const Generator& g, bool on) { DeviceGenerator::of(g).draws->in_graph = on; }

}  // namespace

TORCH_LIBRARY(pretend, m) {
  m.def("pin", &pin);
  m.def("is_pinned", &is_pinned);
  m.def("generator", &the_generator);
  m.def("in_graph", &in_graph);
  m.def("draw_as_cpu(bool on) -> ()", &draw_as_cpu);
  m.def("put_in_graph(Generator? generator, bool on) -> ()", &put_in_graph);
}

extern "C" {
// Before torch's Python part is imported, as that asks which devices there are.
void pretend_install(const char* type, const char* host_scalars, const char* that_wait) {
  const bool cuda = std::string(type) == "cuda";
  device.type = cuda ? c10::DeviceType::CUDA : c10::DeviceType::MPS;
  device.host_scalars = lines(host_scalars);
  device.waits = lines(that_wait);
  new c10::impl::DeviceGuardImplRegistrar(device.type, new Guard);
  c10::SetAllocator(device.type, &device_memory, /*priority=*/100);
  if (cuda)
    at::CUDAHooksRegistry()->Register(
        "CUDAHooks", [](at::CUDAHooksArgs) { return std::make_unique<CUDA>(); });
  else
    at::MPSHooksRegistry()->Register("MPSHooks", [] { return std::make_unique<MPS>(); });
  const auto key = cuda ? c10::DispatchKey::CUDA : c10::DispatchKey::MPS;
  static torch::Library all(torch::Library::IMPL, "_", key, __FILE__, __LINE__);
  all.fallback(torch::CppFunction::makeFromBoxedFunction<&run>());
  static torch::Library aten(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
  implement(aten);
}
void pretend_set_sync_debug(int mode) { sync_debug = mode; }
int pretend_get_sync_debug() { return sync_debug; }
void pretend_set_capturing(int on) { capturing = on; }
void pretend_set_nobody_else(int on) { nobody_else = on; }
int64_t pretend_allocated() { return allocated; }
int64_t pretend_peak() { return peak; }
void pretend_reset_peak() { peak = allocated.load(); }
}
