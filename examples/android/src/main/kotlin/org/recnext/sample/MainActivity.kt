package org.recnext.sample

import android.app.Activity
import android.content.Intent
import android.graphics.Bitmap
import android.graphics.Canvas
import android.graphics.ImageDecoder
import android.graphics.Paint
import android.graphics.Rect
import android.os.Bundle
import android.widget.Button
import android.widget.ImageView
import android.widget.LinearLayout
import android.widget.TextView
import java.io.File
import kotlin.concurrent.thread

/** Pick a picture; see it with its segments laid over it, half transparent, and the names of its classes. */
class MainActivity : Activity() {
    private val segmentor by lazy {
        val file = File(filesDir, "model.pte")
        assets.open("model.pte").use { from -> file.outputStream().use { to -> from.copyTo(to) } }
        Segmentor(file.path)
    }
    private lateinit var picture: ImageView
    private lateinit var legend: TextView

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        picture = ImageView(this).apply { adjustViewBounds = true }
        legend = TextView(this)
        val choose = Button(this).apply { text = "Choose a picture" }
        choose.setOnClickListener {
            startActivityForResult(Intent(Intent.ACTION_GET_CONTENT).setType("image/*"), 0)
        }
        setContentView(LinearLayout(this).apply {
            orientation = LinearLayout.VERTICAL
            listOf(choose, picture, legend).forEach(::addView)
        })
    }

    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        super.onActivityResult(request, result, data)
        val uri = data?.data ?: return
        legend.text = "..."
        thread {
            val source = ImageDecoder.createSource(contentResolver, uri)
            val photo = ImageDecoder.decodeBitmap(source) { decoder, _, _ ->
                decoder.allocator = ImageDecoder.ALLOCATOR_SOFTWARE  // pixels that can be read
            }
            val began = System.nanoTime()
            val segments = segmentor.segment(photo)
            val milliseconds = (System.nanoTime() - began) / 1_000_000
            val shown = photo.copy(Bitmap.Config.ARGB_8888, true)
            Canvas(shown).drawBitmap(
                segments.overlay, null, Rect(0, 0, shown.width, shown.height), Paint().apply { alpha = 128 })
            val shares = segments.classes.take(12).joinToString("\n") { (name, share) ->
                "%s %.0f %%".format(name, 100 * share)
            }
            runOnUiThread {
                picture.setImageBitmap(shown)
                legend.text = "$milliseconds ms\n$shares"
            }
        }
    }
}
