import java.lang.reflect.Field;
import java.util.concurrent.atomic.AtomicBoolean;
import sun.misc.Unsafe;

/** A Java program whose native library moves memory by RDMA while the virtual machine collects garbage and starts programs. */
public final class Verbs {
    private static final int ROUNDS = 60;
    private static final int LENGTH = 1 << 20;

    private Verbs() {}

    /** Registers both, writes one to the other by the device, deregisters both. */
    private static native void move(long to, long from, int length);

    private static void litter(AtomicBoolean stop) {
        while (!stop.get()) {
            byte[][] piles = new byte[256][];
            for (int i = 0; i < piles.length; i++) {
                piles[i] = new byte[8192];
            }
            System.gc();
        }
    }

    /** The program. Its argument is the native library's path. */
    public static void main(String[] arguments) throws Exception {
        System.load(arguments[0]);
        Field field = Unsafe.class.getDeclaredField("theUnsafe");
        field.setAccessible(true);
        Unsafe memory = (Unsafe) field.get(null);
        AtomicBoolean stop = new AtomicBoolean();
        Thread litterer = new Thread(() -> litter(stop));
        litterer.start();
        long from = memory.allocateMemory(LENGTH);
        long to = memory.allocateMemory(LENGTH);
        for (int round = 0; round < ROUNDS; round++) {
            for (int i = 0; i < LENGTH; i += 8) {
                memory.putLong(from + i, (long) round * LENGTH + i);
            }
            move(to, from, LENGTH);
            for (int i = 0; i < LENGTH; i += 8) {
                if (memory.getLong(to + i) != (long) round * LENGTH + i) {
                    throw new IllegalStateException("round " + round + ": other bytes at " + i);
                }
            }
            if (round % 10 == 0 && new ProcessBuilder("true").start().waitFor() != 0) {
                throw new IllegalStateException("a program did not end well");
            }
        }
        stop.set(true);
        litterer.join();
        System.out.println("ok");
    }
}
