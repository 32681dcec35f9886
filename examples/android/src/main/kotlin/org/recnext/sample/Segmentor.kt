package org.recnext.sample

import android.graphics.Bitmap
import org.json.JSONObject
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/** What a picture shows: an overlay of the file's size, and the classes from the largest to the smallest. */
class Segments(val overlay: Bitmap, val classes: List<Pair<String, Double>>)

/** A `.pte` file of `export --to executorch`, with labels among its outputs. */
class Segmentor(path: String) {
    private val module = Module.load(path)
    private val about = JSONObject(module.execute("metadata")[0].toStr())
    private val height = about.getInt("height")
    private val width = about.getInt("width")
    private val outputs = about.getJSONArray("outputs").let { names -> List(names.length()) { names.getString(it) } }
    private val names = about.getJSONArray("classes").let { names -> List(names.length()) { names.getString(it) } }
    private val colors = about.getJSONArray("palette").let { palette ->
        IntArray(palette.length()) { index ->
            val rgb = palette.getJSONArray(index)
            0xFF000000.toInt() or (rgb.getInt(0) shl 16) or (rgb.getInt(1) shl 8) or rgb.getInt(2)
        }
    }

    fun segment(photo: Bitmap): Segments {
        val pixels = IntArray(height * width)
        Bitmap.createScaledBitmap(photo, width, height, true).getPixels(pixels, 0, width, 0, 0, width, height)
        // All of red, then all of green, then all of blue, from 0 to 255: the file normalises them itself. Interleaved
        // (channels-last) they would be read wrongly, without an error.
        val planes = FloatArray(3 * pixels.size) { index ->
            val channel = index / pixels.size
            (pixels[index % pixels.size] shr (16 - 8 * channel) and 0xFF).toFloat()
        }
        val image = Tensor.fromBlob(planes, longArrayOf(1, 3, height.toLong(), width.toLong()))
        val labels = module.forward(EValue.from(image))[outputs.indexOf("labels")].toTensor().dataAsIntArray
        val overlay = Bitmap.createBitmap(width, height, Bitmap.Config.ARGB_8888)
        overlay.setPixels(IntArray(labels.size) { colors[labels[it]] }, 0, width, 0, 0, width, height)
        val shares = labels.toList().groupingBy { it }.eachCount().entries.sortedByDescending { it.value }
        return Segments(overlay, shares.map { (label, count) -> names[label] to count.toDouble() / labels.size })
    }
}
